"""Draws the windows: a pure function from (seed, split, window index, slots) to numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling.schedule import Phase, Schedule
from l2l_scale.tasks.base import Arrays, TaskFamily
from l2l_scale.tree import tree_map
from l2l_scale.unroll import WindowBatch


class Window(NamedTuple):
    """The numpy form of :class:`~l2l_scale.unroll.WindowBatch`, cheap to ship between processes."""

    window_index: int
    inner_step: np.ndarray
    reset: np.ndarray
    task: Arrays
    theta0: np.ndarray
    data: Arrays
    window_length: int
    horizon: int

    def to_batch(self, dtype: torch.dtype = torch.float32) -> WindowBatch:
        """As tensors; floats in ``dtype``, integers and booleans as they are. Copies."""

        def tensor(leaf: object) -> object:
            if not isinstance(leaf, np.ndarray):
                return leaf
            value = torch.tensor(leaf)
            return value.to(dtype) if value.is_floating_point() else value

        return WindowBatch(*tree_map(tensor, tuple(self)))


class Problem(NamedTuple):
    """One drawn task: its constants and its start point."""

    task: Arrays
    theta0: np.ndarray


def draw_problem(family: TaskFamily, seed: int, split: Split, slot: int, generation: int) -> Problem:
    """Draw the task that a slot works on in a generation."""
    task = family.sample_task(stream(seed, split, Channel.TASK, slot, generation))
    theta0 = family.sample_init(stream(seed, split, Channel.INIT, slot, generation), task)
    assert theta0.shape == (family.spec.size,), (theta0.shape, family.spec.size)
    return Problem(task, theta0)


@dataclass(frozen=True)
class WindowSampler:
    """Draws windows of tasks.

    Args:
        family: what is drawn; of the data split that is meant (:meth:`TaskFamily.for_split`).
        schedule: which trajectory each slot is on.
        seed: of the streams.
        split: of the streams.
    """

    family: TaskFamily
    schedule: Schedule
    seed: int
    split: Split
    _last: dict[int, tuple[int, Problem]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Each slot's generation and problem. Drawing is pure, so this memory changes nothing but the time."""

    def __call__(self, index: int, slots: range) -> Window:
        """Draw window ``index`` of these (global) slots."""
        phases = [self.schedule.phase(index, slot) for slot in slots]
        problems = [self._problem(slot, phase.generation) for slot, phase in zip(slots, phases, strict=True)]
        return Window(
            window_index=index,
            inner_step=np.array([phase.window * self.schedule.window for phase in phases]),
            reset=np.array([phase.reset for phase in phases]),
            task=_stack([problem.task for problem in problems]),
            theta0=_stack([problem.theta0 for problem in problems]),
            data=self._data(slots, phases, problems),
            window_length=self.schedule.window,
            horizon=self.schedule.horizon,
        )

    def _problem(self, slot: int, generation: int) -> Problem:
        """The problem of a slot, drawn once for all windows of its trajectory."""
        known, problem = self._last.get(slot, (None, None))
        if known != generation or problem is None:
            problem = draw_problem(self.family, self.seed, self.split, slot, generation)
            self._last[slot] = generation, problem
        return problem

    def _data(self, slots: range, phases: Sequence[Phase], problems: Sequence[Problem]) -> Arrays:
        """Minibatches (K + 1, S, ...): one per inner step, and one for the loss after the last."""
        if not self.family.has_data:
            return {}

        def draw(slot: int, phase: Phase, problem: Problem, k: int) -> Arrays:
            step = phase.window * self.schedule.window + k
            rng = stream(self.seed, self.split, Channel.DATA, slot, phase.generation, step)
            return self.family.sample_data(rng, problem.task)

        rows = list(zip(slots, phases, problems, strict=True))
        steps = range(self.schedule.window + 1)
        minibatches: Arrays = _stack([_stack([draw(*row, k) for row in rows]) for k in steps])
        return minibatches


def _stack(trees: Sequence[Any]) -> Any:
    """Stack arrays, or dicts of arrays, along a new first axis."""
    return tree_map(lambda *leaves: np.stack(leaves), trees[0], *trees[1:])
