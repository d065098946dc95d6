from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient, small_lstm
from torch import Tensor

from l2l_scale.estimators import LogLoss, MetaLoss, NormalizedLoss, SumLoss, TruncatedBPTT
from l2l_scale.optimizers import UpdateRule
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic, TaskFamily, Tensors
from l2l_scale.tree import Tree, tree_detach, tree_leaves, tree_map
from l2l_scale.unroll import Carry, InnerGradient, Rollout, WindowBatch, begin, has_diverged, unroll

FAMILIES = [Quadratic(dimension=4), Regression()]
MODES = list(InnerGradient)


class Descent(UpdateRule):
    """Gradient descent that counts its inner steps per slot; with a rate as φ."""

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(rate))

    def init_state(self, theta: Tensor) -> Tree:
        return torch.zeros_like(theta[..., :1])

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        return -self.rate * grad, state + 1


def run(
    rule: UpdateRule, family: TaskFamily, windows: list[WindowBatch], mode: InnerGradient
) -> list[Rollout]:
    """Window after window, each from the (detached) end of the one before."""
    carry: Carry | None = None
    rollouts = []
    for batch in windows:
        rollouts.append(unroll(rule, family, begin(rule, batch, carry), batch, mode))
        carry = tree_detach(rollouts[-1].carry)
    return rollouts


def equal_trees(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def take_slots(batch: WindowBatch, slots: list[int]) -> WindowBatch:
    def first(leaf: Tensor) -> Tensor:
        return leaf[slots]

    return batch._replace(
        inner_step=batch.inner_step[slots],
        reset=batch.reset[slots],
        theta0=batch.theta0[slots],
        task=tree_map(first, batch.task),
        data=tree_map(lambda leaf: leaf[:, slots], batch.data),
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_compose(family: TaskFamily, mode: InnerGradient, dtype: torch.dtype) -> None:
    rule = small_lstm().to(dtype)
    whole = draw_windows(family, Schedule(horizon=12, window=12), 1, dtype=dtype)
    parts = draw_windows(family, Schedule(horizon=12, window=3, staggered=False), 4, dtype=dtype)
    (full,) = run(rule, family, whole, mode)
    pieces = run(rule, family, parts, mode)
    assert torch.equal(torch.cat([piece.losses for piece in pieces]), full.losses)
    assert equal_trees(pieces[-1].carry, full.carry)
    assert torch.equal(pieces[-1].update_rms, full.update_rms)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_modes_see_the_same_losses(family: TaskFamily, dtype: torch.dtype) -> None:
    rule = small_lstm().to(dtype)
    (batch,) = draw_windows(family, Schedule(horizon=20, window=20), 1, dtype=dtype)
    rollouts = [run(rule, family, [batch], mode)[0] for mode in MODES]
    for rollout in rollouts[1:]:
        assert equal_trees(rollout, rollouts[0])


def test_only_the_modes_with_gradient_build_a_graph() -> None:
    rule, family = small_lstm(), Quadratic(dimension=3)
    (batch,) = draw_windows(family, Schedule(horizon=4, window=4), 1, dtype=torch.float32)
    for mode in MODES:
        rollout = run(rule, family, [batch], mode)[0]
        assert rollout.losses.requires_grad == (mode is not InnerGradient.NONE)
        assert rollout.carry.theta.requires_grad == (mode is not InnerGradient.NONE)
        assert not rollout.carry.start_loss.requires_grad
        assert not rollout.update_rms.requires_grad


class ByAutograd(Quadratic):
    """The quadratic without its formula for the gradient; notes when a graph is asked for."""

    graphs: ClassVar[list[bool]] = []

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        self.graphs.append(create_graph)
        assert theta.requires_grad == create_graph
        return TaskFamily.losses_and_gradients(self, theta, task, data, create_graph)


@pytest.mark.parametrize("mode", MODES)
def test_a_formula_for_the_gradient_changes_nothing(mode: InnerGradient, double: torch.dtype) -> None:
    rule = small_lstm()
    (batch,) = draw_windows(Quadratic(dimension=4), Schedule(horizon=8, window=8), 1)
    formula, autograd = (run(rule, kind(dimension=4), [batch], mode)[0] for kind in (Quadratic, ByAutograd))
    assert equal_trees(formula, autograd)
    if mode is not InnerGradient.NONE:
        expected = phi_gradient(rule, autograd.losses.sum())
        assert (phi_gradient(rule, formula.losses.sum()) - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("mode", MODES)
def test_families_are_asked_for_a_graph_only_where_losses_depend_on_phi_through_it(
    mode: InnerGradient,
) -> None:
    (batch,) = draw_windows(Quadratic(dimension=3), Schedule(horizon=3, window=3), 1, dtype=torch.float32)
    ByAutograd.graphs.clear()
    run(small_lstm(), ByAutograd(dimension=3), [batch], mode)
    needed = mode is InnerGradient.SECOND_ORDER
    assert ByAutograd.graphs == [False, needed, needed, needed]  # θ_0 does not depend on φ


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("mode", MODES)
def test_slots_do_not_influence_each_other(
    family: TaskFamily, mode: InnerGradient, double: torch.dtype
) -> None:
    # Close, not equal: matrix products round differently for another number of rows.
    rule, chosen = small_lstm(), [5, 2]
    (batch,) = draw_windows(family, Schedule(horizon=10, window=10), 1, range(7))
    together, alone = (run(rule, family, [b], mode)[0] for b in (batch, take_slots(batch, chosen)))
    assert (together.losses[:, chosen] - alone.losses).abs().max() <= 1e-12 * alone.losses.abs().max()
    assert (together.carry.theta[chosen] - alone.carry.theta).abs().max() <= 1e-12
    if mode is not InnerGradient.NONE:
        expected = phi_gradient(rule, alone.losses.sum())
        difference = phi_gradient(rule, together.losses[:, chosen].sum()) - expected
        assert difference.norm() <= 1e-12 * expected.norm()


def test_losses_are_those_of_the_family_after_each_inner_step(double: torch.dtype) -> None:
    family, rule = Regression(), Descent(0.05)
    (batch,) = draw_windows(family, Schedule(horizon=5, window=5), 1)
    (rollout,) = run(rule, family, [batch], InnerGradient.NONE)
    for slot in range(4):
        theta = batch.theta0[slot].clone().requires_grad_()
        task = {name: leaf[slot] for name, leaf in batch.task.items()}
        for k in range(6):
            data = {"rows": batch.data["rows"][k, slot]}
            loss = family.loss(family.spec.unflatten(theta), task, data)
            logged = rollout.losses[k - 1, slot] if k else rollout.carry.start_loss[slot]
            assert abs(float(loss.detach() - logged)) <= 1e-14
            (grad,) = torch.autograd.grad(loss, theta)
            if k < 5:
                theta = (theta - 0.05 * grad).detach().requires_grad_()
        assert (rollout.carry.theta[slot] - theta).abs().max() <= 1e-14


def test_update_rms_is_the_root_mean_square_of_the_last_update(double: torch.dtype) -> None:
    family, rule = Quadratic(dimension=3), Descent()
    before, after = draw_windows(family, Schedule(horizon=2, window=1, staggered=False), 2)
    first, second = run(rule, family, [before, after], InnerGradient.NONE)
    update = second.carry.theta - first.carry.theta
    assert (second.update_rms - update.square().mean(-1).sqrt()).abs().max() <= 1e-15


def test_begin_starts_all_slots_without_a_carry_and_otherwise_those_told_or_diverged() -> None:
    family, rule = Quadratic(dimension=3), Descent()
    first, second = draw_windows(family, Schedule(horizon=4, window=2), 2, range(4), torch.float32)
    assert begin(rule, second, None).theta is second.theta0
    (rollout,) = run(rule, family, [first], InnerGradient.NONE)
    old = rollout.carry._replace(diverged=torch.tensor([True, False, False, False]))
    assert second.reset.tolist() == [False, True, False, True]
    carry = begin(rule, second, old)
    for slot, starts in enumerate([True, True, False, True]):
        assert torch.equal(carry.theta[slot], (second.theta0 if starts else old.theta)[slot])
        assert carry.state[slot].item() == (0.0 if starts else 2.0)
        assert carry.start_loss[slot].isnan() == starts
        assert starts or carry.start_loss[slot] == old.start_loss[slot]
    assert not carry.diverged.any()


def test_start_loss_is_the_first_loss_of_the_trajectory_and_kept_over_windows() -> None:
    family, rule = Quadratic(dimension=3), small_lstm()
    windows = draw_windows(family, Schedule(horizon=4, window=2, staggered=False), 4, dtype=torch.float32)
    rollouts = run(rule, family, windows, InnerGradient.NONE)
    for index in range(4):
        batch = windows[index // 2 * 2]
        expected = family.losses(batch.theta0, batch.task, {})
        assert torch.equal(rollouts[index].carry.start_loss, expected)
    assert not torch.equal(rollouts[0].carry.start_loss, rollouts[2].carry.start_loss)


def test_a_window_is_cut_from_the_one_before_even_if_its_carry_is_attached() -> None:
    family, rule = Quadratic(dimension=3), small_lstm()
    first, second = draw_windows(
        family, Schedule(horizon=4, window=2, staggered=False), 2, dtype=torch.float32
    )
    for mode in (InnerGradient.FIRST_ORDER, InnerGradient.SECOND_ORDER):
        attached = run(rule, family, [first], mode)[0].carry
        gradients = [
            phi_gradient(rule, unroll(rule, family, begin(rule, second, carry), second, mode).losses.sum())
            for carry in (attached, tree_detach(attached))
        ]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_slots_do_not_move_and_give_no_gradient(mode: InnerGradient, double: torch.dtype) -> None:
    family, rule = Quadratic(dimension=3), small_lstm()
    (batch,) = draw_windows(family, Schedule(horizon=5, window=5), 1)
    frozen, free = torch.tensor([False, True, False, True]), [0, 2]
    carry = begin(rule, batch, None)
    held, moved = unroll(rule, family, carry, batch, mode, frozen), unroll(rule, family, carry, batch, mode)
    assert torch.equal(held.carry.theta[frozen], batch.theta0[frozen])
    assert torch.equal(held.losses[:, frozen], held.carry.start_loss[frozen].expand(5, 2))
    assert torch.equal(held.losses[:, free], moved.losses[:, free])
    if mode is not InnerGradient.NONE:
        assert not phi_gradient(rule, held.losses[:, frozen].sum()).any()


@pytest.mark.parametrize(
    ("losses", "start", "diverged"),
    [
        ([1.0, 2.0], 1.0, False),
        ([1.0, 201.0], 1.0, False),
        ([201.1, 1.0], 1.0, True),
        ([1.0, torch.nan], 1.0, True),
        ([torch.nan, 1.0], 1.0, True),
        ([torch.inf, 1.0], 1.0, True),
        ([-torch.inf, 1.0], 1.0, True),
        ([1.0, 1.0], torch.nan, True),
        ([torch.inf, torch.inf], torch.inf, True),
        ([torch.inf, 1.0], 3e38, True),
        ([-1e9, -5.0], -5.0, False),
        ([595.1, -5.0], -5.0, True),
        ([0.0, 100.0], 0.0, False),
    ],
)
def test_has_diverged(losses: list[float], start: float, diverged: bool) -> None:
    result = has_diverged(torch.tensor(losses)[:, None], torch.tensor([start]), 100.0)
    assert result.tolist() == [diverged]


def spoil(batch: WindowBatch, slot: int, name: str, value: float) -> WindowBatch:
    constant = batch.task[name].clone()
    constant[slot] = value
    return batch._replace(task={**batch.task, name: constant})


@pytest.mark.parametrize(
    "meta_loss", [SumLoss(), LogLoss(), NormalizedLoss()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [("w", torch.nan), ("w", torch.inf), ("y", -torch.inf), ("y", 1e200), ("w", 1e8)],
    ids=lambda v: str(v),
)
def test_a_sick_task_leaves_the_gradient_of_the_others_alone(
    name: str, value: float, second_order: bool, meta_loss: MetaLoss, double: torch.dtype
) -> None:
    # NaN and inf (1e200 squared too) are sick from the start; w = 1e8 starts near 1 and is thrown far away.
    rule, family = small_lstm(), Quadratic(dimension=4, theta0_scale=1e-8)
    healthy = draw_windows(family, Schedule(horizon=6, window=6), 1)[0]
    estimator = TruncatedBPTT(second_order, meta_loss)
    estimates = []
    for batch in (spoil(healthy, 1, name, value), take_slots(healthy, [0, 2, 3])):
        estimates.append(estimator(rule, family, begin(rule, batch, None), batch))
    assert estimates[0].rollout.carry.diverged.tolist() == [False, True, False, False]
    got, expected = (phi_gradient(rule, estimate.surrogate) for estimate in estimates)
    assert got.isfinite().all()
    # Another number of rows rounds differently; the masked slot itself adds nothing, to a mean over all four.
    assert (got - 3 / 4 * expected).norm() <= 1e-12 * expected.norm()
    assert abs(float((estimates[0].surrogate - 3 / 4 * estimates[1].surrogate).detach())) <= 1e-12
    assert torch.equal(estimates[0].rollout.carry.theta[1], healthy.theta0[1])


class Exploding(Descent):
    """Descends for two inner steps, then multiplies θ by 1e200: overflow in the middle of the window."""

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        update, count = super().forward(grad, theta, state)
        wild = (count > 2) & (theta[:, :1] > 0)
        return torch.where(wild, theta * self.rate * 1e200, update), count


@pytest.mark.parametrize("second_order", [False, True])
def test_overflow_in_the_middle_of_a_window_is_masked(second_order: bool, double: torch.dtype) -> None:
    rule, family = Exploding(), Quadratic(dimension=4, w_scale=0.1)
    (batch,) = draw_windows(family, Schedule(horizon=6, window=6), 1, range(8))
    batch.theta0[:, 0] = 1e-3 * torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    estimate = TruncatedBPTT(second_order)(rule, family, begin(rule, batch, None), batch)
    diverged = estimate.rollout.carry.diverged
    assert diverged.any()
    assert not diverged.all()
    rest = take_slots(batch, (~diverged).nonzero().squeeze(-1).tolist())
    alone = TruncatedBPTT(second_order)(rule, family, begin(rule, rest, None), rest)
    got, expected = phi_gradient(rule, estimate.surrogate), phi_gradient(rule, alone.surrogate)
    assert got.isfinite().all()
    share = float((~diverged).double().mean())
    assert (got - share * expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("second_order", [False, True])
def test_if_all_slots_diverge_value_and_gradient_are_zero(second_order: bool) -> None:
    rule, family = small_lstm(), Quadratic(dimension=4)
    (batch,) = draw_windows(family, Schedule(horizon=3, window=3), 1, range(2), torch.float32)
    batch = spoil(spoil(batch, 0, "w", torch.nan), 1, "y", torch.inf)
    estimate = TruncatedBPTT(second_order)(rule, family, begin(rule, batch, None), batch)
    assert estimate.rollout.carry.diverged.all()
    assert float(estimate.surrogate.detach()) == 0.0
    assert not phi_gradient(rule, estimate.surrogate).any()


def test_a_diverged_slot_starts_again_in_the_next_window() -> None:
    rule, family = small_lstm(), Quadratic(dimension=4)
    first, second = draw_windows(
        family, Schedule(horizon=6, window=3, staggered=False), 2, dtype=torch.float32
    )
    sick = spoil(first, 2, "w", torch.nan)
    carry = tree_detach(TruncatedBPTT()(rule, family, begin(rule, sick, None), sick).rollout.carry)
    again = begin(rule, second, carry)
    fresh = begin(rule, second, None)
    assert equal_trees(
        tree_map(lambda leaf: leaf[2], again.state), tree_map(lambda leaf: leaf[2], fresh.state)
    )
    assert torch.equal(again.theta[2], second.theta0[2])
    healed = unroll(rule, family, again, second, InnerGradient.NONE).carry
    assert torch.equal(healed.start_loss[2], family.losses(second.theta0, second.task, {})[2])
    assert not healed.diverged.any()
