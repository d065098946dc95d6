from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Regression

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import Schedule, Window, WindowSampler
from l2l_scale.tasks import Quadratic, TaskFamily
from l2l_scale.tree import tree_leaves
from l2l_scale.unroll import WindowBatch

SCHEDULE = Schedule(horizon=12, window=3)
FAMILIES = [Quadratic(dimension=4), Regression()]

GOLDEN = "7c01c362c150292e94c42da6974979b687f9d8743bd2f62a45c547aaeae772ac"
"""Changing this hash changes every run ever made: resumed runs would go on with other tasks."""


def make_sampler(family: TaskFamily, seed: int = 0, split: Split = Split.TRAIN) -> WindowSampler:
    return WindowSampler(family, SCHEDULE, seed, split)


def rows(window: Window, chosen: list[int]) -> list[np.ndarray]:
    """All arrays of a window, with these slots only."""
    flat = [window.inner_step, window.reset, window.theta0, *window.task.values()]
    return [leaf[chosen] for leaf in flat] + [leaf[:, chosen] for leaf in window.data.values()]


def assert_equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_stream_of_quadratics_has_the_golden_hash() -> None:
    digest = hashlib.sha256()
    for split in Split:
        for index in range(6):
            window = make_sampler(Quadratic(), seed=1, split=split)(index, range(3, 8))
            digest.update(np.array([window.window_index, window.window_length, *window.inner_step]).tobytes())
            for leaf in (window.reset, window.theta0, window.task["w"], window.task["y"]):
                digest.update(leaf.tobytes())
    assert digest.hexdigest() == GOLDEN


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("index", [0, 1, 5, 1000])
def test_any_slots_give_the_same_rows(family: TaskFamily, index: int) -> None:
    sampler = make_sampler(family)
    everyone = sampler(index, range(9))
    for slots in (range(3), range(3, 9), range(4, 5), range(1, 9, 3)):
        assert_equal(rows(sampler(index, slots), list(range(len(slots)))), rows(everyone, list(slots)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_windows_do_not_depend_on_the_order_in_which_they_are_drawn(family: TaskFamily) -> None:
    everyone = list(range(4))
    forward = [rows(make_sampler(family)(index, range(4)), everyone) for index in range(8)]
    sampler = make_sampler(family)
    for index in (*reversed(range(8)), 3, 3, 0):
        assert_equal(rows(sampler(index, range(4)), everyone), forward[index])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_draws_come_from_the_streams_of_slot_generation_and_inner_step(family: TaskFamily) -> None:
    window = make_sampler(family, seed=5, split=Split.VALID)(7, range(2, 4))
    for row, slot in enumerate((2, 3)):
        phase = SCHEDULE.phase(7, slot)
        key = (slot, phase.generation)
        task = family.sample_task(stream(5, Split.VALID, Channel.TASK, *key))
        theta0 = family.sample_init(stream(5, Split.VALID, Channel.INIT, *key), task)
        assert_equal([leaf[row] for leaf in window.task.values()], list(task.values()))
        np.testing.assert_array_equal(window.theta0[row], theta0)
        assert window.inner_step[row] == 3 * phase.window
        assert window.reset[row] == phase.reset
        for k in range(4) if family.has_data else ():
            rng = stream(5, Split.VALID, Channel.DATA, *key, 3 * phase.window + k)
            data = family.sample_data(rng, task)
            assert_equal([leaf[k, row] for leaf in window.data.values()], list(data.values()))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_splits_and_seeds_never_share_a_task_or_a_start(family: TaskFamily) -> None:
    drawn: list[Any] = []
    for seed in (0, 1):
        for split in Split:
            window = make_sampler(family, seed, split)(0, range(20))
            drawn += [leaf.tobytes() for leaf in window.theta0]
            drawn += [leaf.tobytes() for leaf in next(iter(window.task.values()))]
    assert len(set(drawn)) == len(drawn) == 2 * len(Split) * 20 * 2


def test_the_task_stays_for_a_trajectory_and_then_changes() -> None:
    sampler = make_sampler(Regression())
    windows = [sampler(index, range(4)) for index in range(6)]
    for before, after in pairwise(windows):
        for slot in range(4):
            same = np.array_equal(before.task["x"][slot], after.task["x"][slot])
            assert same == np.array_equal(before.theta0[slot], after.theta0[slot]) == (not after.reset[slot])


def test_within_a_trajectory_the_last_minibatch_of_a_window_is_the_first_of_the_next() -> None:
    sampler = make_sampler(Regression())
    windows = [sampler(index, range(4)) for index in range(6)]
    for before, after in pairwise(windows):
        assert before.data["rows"].shape == (4, 4, 5)
        for slot in range(4):
            same = np.array_equal(before.data["rows"][-1, slot], after.data["rows"][0, slot])
            assert same == (not after.reset[slot])


def test_minibatches_differ_between_inner_steps_and_slots() -> None:
    minibatches = make_sampler(Regression())(1, range(4)).data["rows"].reshape(-1, 5)
    assert len(np.unique(minibatches, axis=0)) == len(minibatches)


def test_a_family_without_data_has_none() -> None:
    assert make_sampler(Quadratic())(0, range(2)).data == {}


@dataclass(frozen=True)
class Numbers(Quadratic):
    """A family with constants that are integers, truth values and bare numbers."""

    def sample_task(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        odd = {"count": np.array(3), "flag": np.array([True]), "scale": np.float64(rng.random())}
        return {**super().sample_task(rng), **odd}


def test_batches_are_tensors_of_the_wanted_precision() -> None:
    window = make_sampler(Numbers(dimension=2))(1, range(3))
    for dtype in (torch.float32, torch.float64):
        batch = window.to_batch(dtype)
        assert isinstance(batch, WindowBatch)
        assert (batch.window_index, batch.window_length) == (1, 3)
        assert batch.theta0.dtype is batch.task["w"].dtype is batch.task["scale"].dtype is dtype
        assert batch.task["count"].dtype is torch.int64
        assert batch.task["flag"].dtype is batch.reset.dtype is torch.bool
        assert batch.inner_step.dtype is torch.int64
        assert batch.task["scale"].shape == (3,)


def test_batches_hold_copies_so_that_changing_one_changes_no_later_draw() -> None:
    sampler = make_sampler(Regression())
    window, expected = sampler(1, range(2)), sampler(1, range(2))
    for leaf in tree_leaves(window.to_batch(torch.float64)):
        if isinstance(leaf, torch.Tensor):
            leaf.zero_()
    assert_equal(rows(window, [0, 1]), rows(expected, [0, 1]))
    for leaf in rows(window, [0, 1]):
        leaf[...] = 0
    assert_equal(rows(sampler(1, range(2)), [0, 1]), rows(expected, [0, 1]))
