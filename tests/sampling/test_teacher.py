"""A teacher's losses are those of an evaluation of its rule, whatever is drawn when and with what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Regression

from l2l_scale.estimators import RelativeLoss, TruncatedBPTT
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import SGD, Adam, HeavyBall, UpdateRule
from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import RandomHorizons, Schedule, Teacher, WindowSampler
from l2l_scale.sampling.sampler import draw_problem
from l2l_scale.tasks import ImageClassifier, Quadratic, TaskFamily
from l2l_scale.unroll import begin

LOCKSTEP = Schedule(horizon=12, window=4, staggered=False)
STAGGERED = Schedule(horizon=12, window=4)
DIGITS = ImageClassifier(dataset="digits", hidden=(5,), batch_size=16)
FAMILIES = [Quadratic(dimension=4), Regression(), DIGITS]
RULES = [SGD(0.02), HeavyBall(0.01, 0.8), Adam(0.05)]


def taught(family: TaskFamily, rule: UpdateRule, schedule: Schedule) -> WindowSampler:
    return WindowSampler(family.for_split(Split.TRAIN), schedule, 3, Split.TRAIN, Teacher(rule))


def trajectory(sampler: WindowSampler, slots: range, order: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """The teacher's losses of the first trajectories in lockstep, (T, S); the windows drawn in this order."""
    parts = {index: sampler(index, slots).teacher["losses"] for index in order}
    return np.concatenate([parts[index] for index in range(3)])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_losses_are_those_of_an_evaluation(family: TaskFamily, rule: UpdateRule) -> None:
    held_out = HeldOut(family=family, seed=3, split=Split.TRAIN, num_tasks=5, inner_steps=12, window=4)
    expected = loss_curves(rule, held_out)[1:].numpy()
    losses = trajectory(taught(family, rule, LOCKSTEP), range(5))
    assert losses.dtype == np.float32
    assert losses.shape == (12, 5)
    # Single problems and blocks of problems are multiplied by different kernels, so they round differently.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_losses_do_not_depend_on_slots_drawn_together_or_windows_asked_before(family: TaskFamily) -> None:
    whole = trajectory(taught(family, RULES[2], LOCKSTEP), range(5))
    for slots in (range(1), range(2, 4), range(1, 5)):
        for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
            part = trajectory(taught(family, RULES[2], LOCKSTEP), slots, order)
            np.testing.assert_array_equal(part, whole[:, list(slots)])


def test_a_slot_in_the_middle_of_its_trajectory_is_compared_with_the_middle() -> None:
    sampler = taught(Regression(), RULES[0], STAGGERED)
    lockstep = taught(Regression(), RULES[0], LOCKSTEP)
    for slot in range(3):
        start = 3 - slot  # the window in which the slot's second trajectory begins, after its stagger
        for k in range(3):
            ours = sampler(start + k, range(slot, slot + 1))
            theirs = lockstep(3 + k, range(slot, slot + 1))
            np.testing.assert_array_equal(ours.teacher["losses"], theirs.teacher["losses"])


def test_where_a_trajectory_was_cut_short_the_teacher_began_with_it() -> None:
    window = taught(Regression(), RULES[0], STAGGERED)(0, range(3))
    assert window.inner_step.tolist() == [0, 4, 8]
    for slot in range(3):
        family = Regression()
        problem = draw_problem(family, 3, Split.TRAIN, slot, 0)
        steps = range(4 * slot, 13)
        streams = [stream(3, Split.TRAIN, Channel.DATA, slot, 0, step) for step in steps]
        minibatches = [family.sample_data(rng, problem.task) for rng in streams]
        own = Teacher(RULES[0])(family, problem.task, problem.theta0, minibatches)["losses"]
        np.testing.assert_array_equal(window.teacher["losses"][:, slot], own[:4])


def test_the_caller_keeps_its_threads_and_its_gradients() -> None:
    torch.set_num_threads(2)
    try:
        taught(Regression(), RULES[0], STAGGERED)(0, range(2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.is_grad_enabled()


def test_nothing_else_of_a_window_changes_with_a_teacher() -> None:
    with_it = taught(Regression(), RULES[0], STAGGERED)
    without = replace(with_it, teacher=None)
    ours, theirs = with_it(2, range(4)), without(2, range(4))
    assert theirs.teacher == {}
    np.testing.assert_array_equal(ours.theta0, theirs.theta0)
    np.testing.assert_array_equal(ours.data["rows"], theirs.data["rows"])
    np.testing.assert_array_equal(ours.task["x"], theirs.task["x"])


def test_a_teacher_works_as_long_as_the_trajectories_of_a_curriculum() -> None:
    schedule = replace(STAGGERED, curriculum=RandomHorizons(low=4, high=40, strata=3))
    sampler = taught(Quadratic(dimension=3), RULES[0], schedule)
    met = set()
    for index in range(25):
        window = sampler(index, range(3))
        assert window.teacher["losses"].shape == (4, 3)
        met |= set(window.horizon.tolist())
    assert met == set(schedule.horizons)


@pytest.mark.parametrize(
    "family", [Quadratic(dimension=4, y_scale=3.0), Regression()], ids=["quadratic", "rows"]
)
def test_a_rule_that_does_what_its_teacher_does_has_the_number_of_inner_steps_as_meta_loss(
    family: TaskFamily,
) -> None:
    sampler, carry = taught(family, SGD(0.02), STAGGERED), None
    estimator = TruncatedBPTT(meta_loss=RelativeLoss(epsilon=1e-30))
    for index in range(7):
        # One slot alone, so that both round alike; started at once where its trajectory starts.
        batch = sampler(index, range(3, 4)).to_batch()
        carry = begin(SGD(0.02), batch, carry)
        estimate = estimator(SGD(0.02), family, carry, batch)
        carry = estimate.rollout.carry
        assert float(estimate.surrogate) == 4.0
