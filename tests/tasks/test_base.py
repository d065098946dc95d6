"""TaskFamily: the default gradient of any family, and which gradient a subclass gets."""

from __future__ import annotations

import pytest
import torch
from conftest import Regression, draw_windows
from torch import Tensor

from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic, TaskFamily, Tensors

Problem = tuple[Tensor, Tensors, Tensors]


def problem(family: TaskFamily, slots: int = 3) -> Problem:
    """θ, constants and the first minibatch of a window."""
    (batch,) = draw_windows(family, Schedule(horizon=1, window=1), 1, range(slots))
    return batch.theta0, batch.task, {name: leaf[0] for name, leaf in batch.data.items()}


class Ridge(Quadratic):
    """Overrides ``losses`` alone."""

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        return super().losses(theta, task, data) + theta.square().sum(-1)


class RidgeByOne(Quadratic):
    """Overrides ``loss`` alone."""

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        return super().loss(params, task, data) + params["theta"].square().sum(-1)


class Heir(RidgeByOne):
    """Overrides nothing."""


class Twice:
    """A mixin that doubles losses."""

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        return 2 * super().losses(theta, task, data)  # type: ignore[misc]


class Mixed(Twice, Quadratic):
    """The new loss comes from beside."""


class WithFormula(Ridge):
    """Brings the gradient of its own loss."""

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        losses, grads = Quadratic.losses_and_gradients(self, theta, task, data, create_graph)
        return losses + theta.square().sum(-1), grads + 2 * theta


class Renamed(Quadratic):
    """Changes neither loss nor gradient."""


def residual(theta: Tensor, task: Tensors) -> Tensor:
    return torch.einsum("sij,sj->si", task["w"], theta) - task["y"]


@pytest.mark.parametrize(
    ("family", "factor", "ridge"),
    [
        (Ridge(dimension=4), 1, 1),
        (RidgeByOne(dimension=4), 1, 1),
        (Heir(dimension=4), 1, 1),
        (Mixed(dimension=4), 2, 0),
        (WithFormula(dimension=4), 1, 1),
        (Renamed(dimension=4), 1, 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_never_gets_the_gradient_of_another_loss(
    family: TaskFamily, factor: float, ridge: float
) -> None:
    theta, task, data = problem(family)
    losses, grads = family.losses_and_gradients(theta, task, data, create_graph=False)
    r = residual(theta, task)
    expected = factor * r.square().sum(-1) + ridge * theta.square().sum(-1)
    gradient = factor * 2 * torch.einsum("sij,si->sj", task["w"], r) + ridge * 2 * theta
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, gradient, rtol=1e-12, atol=1e-12)


def test_formulas_are_kept_where_they_fit() -> None:
    assert Renamed.losses_and_gradients is Quadratic.losses_and_gradients
    assert "losses_and_gradients" in vars(WithFormula)


def test_the_default_is_the_gradient_of_each_slots_loss() -> None:
    family = Regression()
    theta, task, data = problem(family)
    losses, grads = family.losses_and_gradients(theta, task, data, create_graph=False)
    for slot in range(3):
        x, y = (task[name][slot][data["rows"][slot]] for name in "xy")
        off = x @ theta[slot, :3] + theta[slot, 3] - y
        expected = torch.cat([x.T @ off, off.sum(0, keepdim=True)]) * 2 / len(y)
        torch.testing.assert_close(losses[slot], off.square().mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[slot], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", [Quadratic(dimension=4), Regression()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("grad_mode", [False, True])
def test_without_graph_nothing_has_one_and_theta_is_left_alone(family: TaskFamily, grad_mode: bool) -> None:
    theta, task, data = problem(family)
    with torch.set_grad_enabled(grad_mode):
        results = family.losses_and_gradients(theta, task, data, create_graph=False)
    assert not any(result.requires_grad for result in results)
    assert not theta.requires_grad


@pytest.mark.parametrize("family", [Quadratic(dimension=3), Regression()], ids=lambda f: type(f).__name__)
def test_with_a_graph_both_are_differentiable(family: TaskFamily) -> None:
    theta, task, data = problem(family, slots=2)
    theta.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda point: family.losses_and_gradients(point, task, data, create_graph=True), theta
    )
