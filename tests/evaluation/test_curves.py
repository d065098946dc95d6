"""Loss curves on held-out tasks: the path of training, whatever the blocks in which they are computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from l2l_scale.evaluation.curves import HeldOut, curves_of_all, end_points, loss_curves, sweep
from l2l_scale.optimizers import CoordinatewiseLSTM, UpdateRule
from l2l_scale.optimizers.adaptive import Adam
from l2l_scale.optimizers.classic import SGD, HeavyBall
from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks import ImageClassifier, Quadratic
from l2l_scale.tasks.base import Arrays, Tensors
from l2l_scale.tree import Tree


@dataclass(frozen=True, kw_only=True)
class NoisyQuadratic(Quadratic):
    """‖Wθ − y‖² with a new y at every inner step."""

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        return {"noise": rng.standard_normal(self.dimension)}

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        return super().loss(params, {"w": task["w"], "y": task["y"] + data["noise"]}, data)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        return self.loss({"theta": theta}, task, data)


class Excursion(UpdateRule):
    """Stays, jumps to a far point at inner step 3, and to the origin at inner step 8."""

    def __init__(self, far: float) -> None:
        super().__init__()
        self.far = far

    def init_state(self, theta: Tensor) -> Tree:
        return torch.zeros_like(theta[..., :1])

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        step = state + 1
        goal = torch.where(step == 3, self.far, torch.where(step == 8, 0.0, theta))
        return goal - theta, step


PLAIN = HeldOut(family=Quadratic(dimension=3), seed=1, split=Split.TEST, num_tasks=10, inner_steps=12)
NOISY = replace(PLAIN, family=NoisyQuadratic(dimension=3), window=5)


def lstm() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=4, layers=1)


BOTH = pytest.mark.parametrize("held_out", [PLAIN, NOISY], ids=["deterministic", "minibatches"])


@BOTH
@pytest.mark.parametrize("max_coordinates", [1, 6, 21])
def test_blocks_of_tasks_do_not_change_a_bit(held_out: HeldOut, max_coordinates: int) -> None:
    whole = loss_curves(Adam(0.1), held_out)
    assert whole.shape == (13, 10)
    assert torch.equal(loss_curves(Adam(0.1), replace(held_out, max_coordinates=max_coordinates)), whole)


@BOTH
@pytest.mark.parametrize("max_coordinates", [1, 6, 21])
def test_blocks_change_learned_rules_by_float32_rounding_only(
    held_out: HeldOut, max_coordinates: int
) -> None:
    whole, cut = (
        loss_curves(lstm(), held_out),
        loss_curves(lstm(), replace(held_out, max_coordinates=max_coordinates)),
    )
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)  # BLAS rounds by the number of rows


@pytest.mark.parametrize("window", [1, 3, 5, 12, 100])
def test_windows_do_not_change_a_bit(window: int) -> None:
    assert torch.equal(loss_curves(Adam(0.1), replace(NOISY, window=window)), loss_curves(Adam(0.1), NOISY))


def test_fewer_tasks_are_the_first_of_more() -> None:
    few = loss_curves(SGD(0.01), replace(PLAIN, num_tasks=4))
    assert torch.equal(few, loss_curves(SGD(0.01), PLAIN)[:, :4])
    assert torch.equal(loss_curves(SGD(0.01), PLAIN, range(4)), few)


def test_several_rules_at_once_are_each_as_alone() -> None:
    rules = [SGD(0.01), Adam(0.1)]
    together = curves_of_all(rules, replace(NOISY, max_coordinates=9), range(2, 9))
    for rule, run in zip(rules, together, strict=True):
        assert torch.equal(run.losses, loss_curves(rule, NOISY, range(2, 9)))


def test_gradient_descent_by_hand_in_numpy() -> None:
    curves = loss_curves(SGD(0.02), PLAIN)
    for slot in range(PLAIN.num_tasks):
        task = PLAIN.family.sample_task(stream(1, Split.TEST, Channel.TASK, slot, 0))
        theta = PLAIN.family.sample_init(stream(1, Split.TEST, Channel.INIT, slot, 0), task)
        for t in range(PLAIN.inner_steps + 1):
            residual = task["w"] @ theta - task["y"]
            assert curves[t, slot].item() == pytest.approx(residual @ residual, rel=1e-4)
            theta = theta - 0.02 * 2 * task["w"].T @ residual


def test_tuning_and_test_tasks_differ() -> None:
    tuning = loss_curves(SGD(0.01), replace(PLAIN, split=Split.TUNE))
    assert not torch.isclose(tuning[0], loss_curves(SGD(0.01), PLAIN)[0]).any()


def test_a_slot_gone_far_is_not_started_again() -> None:
    curves = loss_curves(Excursion(1e9), replace(NOISY, window=4))
    assert (curves[3:8] > 1e12).all()  # training would start these again at inner step 4
    assert (curves[8:] < 1e3).all()


def test_what_goes_astray_stays_astray() -> None:
    curves = loss_curves(Excursion(float("nan")), replace(NOISY, window=4))
    assert curves[:3].isfinite().all()
    assert torch.equal(curves[3:], torch.full((10, 10), torch.inf))


@BOTH
@pytest.mark.parametrize("max_coordinates", [1, 7, 10_000])
def test_a_grid_on_the_slot_axis_is_as_one_rollout_per_point(held_out: HeldOut, max_coordinates: int) -> None:
    points = [{"learning_rate": rate, "momentum": m} for rate in (1e-3, 1e-2, 10.0) for m in (0.0, 0.9)]
    held_out = replace(held_out, inner_steps=60)
    scores = sweep(lambda h: HeavyBall(**h), points, replace(held_out, max_coordinates=max_coordinates))
    assert scores.shape == (2, 6, 10)
    for g, point in enumerate(points):
        curves = loss_curves(HeavyBall(**point), held_out).double()
        assert torch.equal(scores[0, g], curves[-1])
        assert torch.equal(scores[1, g], curves[1:].sum(0))
    assert scores[:, 4:].isinf().all()
    assert scores[:, :4].isfinite().all()


@pytest.mark.parametrize("name", ["num_tasks", "inner_steps", "window", "max_coordinates"])
def test_numbers_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \(0\)"):
        replace(PLAIN, **{name: 0})


@BOTH
def test_end_points_are_where_the_last_inner_step_leads(held_out: HeldOut) -> None:
    ends = end_points(SGD(0.05), held_out, range(2, 9))
    family, sampler = held_out.split_family, replace(held_out, window=12).sampler()
    batch = sampler(0, range(2, 9)).to_batch()
    theta = batch.theta0
    for k in range(12):
        data = {name: leaf[k] for name, leaf in batch.data.items()}
        theta = theta - 0.05 * family.losses_and_gradients(theta, batch.task, data, create_graph=False)[1]
    torch.testing.assert_close(ends, theta, rtol=1e-5, atol=1e-6)
    cut = end_points(SGD(0.05), replace(held_out, max_coordinates=6), range(2, 9))
    assert torch.equal(cut, ends)


def test_scores_are_those_of_the_end_points():
    family = ImageClassifier(batch_size=16, hidden=(4,))
    held_out = HeldOut(
        family=family, seed=0, split=Split.TEST, num_tasks=5, inner_steps=40, max_coordinates=600
    )
    (run,) = curves_of_all([SGD(0.5)], held_out, range(1, 5))
    theta = end_points(SGD(0.5), held_out, range(1, 5))
    accuracy = family.for_split(Split.TEST).scores(theta, {})["accuracy"]
    assert run.scores.keys() == {"accuracy"}
    torch.testing.assert_close(run.scores["accuracy"], accuracy, atol=3e-3, rtol=0)
    assert len(set(accuracy.tolist())) > 1
    (beyond,) = curves_of_all([SGD(0.5)], replace(held_out, inner_steps=41), range(2))
    assert beyond.scores == {}
