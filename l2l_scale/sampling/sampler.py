"""Draws the windows: a pure function from (seed, split, window index, slots) to numpy arrays.

S slots, N coordinates, K inner steps of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling.schedule import Phase, Schedule
from l2l_scale.sampling.teacher import Teacher
from l2l_scale.tasks.base import Arrays, TaskFamily
from l2l_scale.tree import tree_leaves, tree_map, tree_unflatten
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
    horizon: np.ndarray
    teacher: Arrays

    def to_batch(self, dtype: torch.dtype = torch.float32) -> WindowBatch:
        """As tensors; floats in ``dtype``, integers and booleans as they are. Copies."""
        return join([self], dtype)

    def single(self) -> Window:
        """With floats in single precision, as they are trained on: half as much to ship."""

        def cast(leaf: object) -> object:
            floats = isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating)
            return leaf.astype(np.float32, copy=False) if floats else leaf  # type: ignore[attr-defined]

        return Window(*tree_map(cast, tuple(self)))

    def slot_axes(self) -> Window:
        """For every leaf which of its axes is that of the slots; None for numbers."""
        first, second = (lambda _: 0), (lambda _: 1)
        return Window(
            window_index=None,  # type: ignore[arg-type]
            inner_step=0,  # type: ignore[arg-type]
            reset=0,  # type: ignore[arg-type]
            task=tree_map(first, self.task),
            theta0=0,  # type: ignore[arg-type]
            data=tree_map(second, self.data),
            window_length=None,  # type: ignore[arg-type]
            horizon=0,  # type: ignore[arg-type]
            teacher=tree_map(second, self.teacher),
        )


def join(
    pieces: Sequence[Window], dtype: torch.dtype = torch.float32, pin_memory: bool = False
) -> WindowBatch:
    """One batch of a window that was drawn in pieces: the slots of one after those of the other.

    Args:
        pieces: the same window of neighbouring ranges of slots. They are copied from once, and not kept.
        dtype: of floats; integers and booleans stay as they are.
        pin_memory: put the batch where a GPU can fetch it while the CPU goes on.
    """
    leaves = zip(*(tree_leaves(tuple(piece)) for piece in pieces), strict=True)
    axes = tree_leaves(tuple(pieces[0].slot_axes()))
    joined = [_join(parts, axis, dtype, pin_memory) for parts, axis in zip(leaves, axes, strict=True)]
    return WindowBatch(*tree_unflatten(joined, tuple(pieces[0])))


def _join(parts: Sequence[Any], axis: int | None, dtype: torch.dtype, pin_memory: bool) -> Any:
    if axis is None:
        return parts[0]
    first: np.ndarray = parts[0]
    floats = np.issubdtype(first.dtype, np.floating)
    kind = dtype if floats else torch.from_numpy(np.empty(0, first.dtype)).dtype
    shape = [*first.shape]
    shape[axis] = sum(part.shape[axis] for part in parts)
    joined: Tensor = torch.empty(shape, dtype=kind, pin_memory=pin_memory)
    start = 0
    for part in parts:
        target = joined.narrow(axis, start, part.shape[axis]).numpy()
        np.copyto(target, part, casting="same_kind")
        start += part.shape[axis]
    return joined


class Problem(NamedTuple):
    """One drawn task: its constants, its start point, and what a teacher does on it."""

    task: Arrays
    theta0: np.ndarray
    teacher: Arrays
    """Of the whole trajectory, (T, ...); empty without a teacher."""


def draw_problem(family: TaskFamily, seed: int, split: Split, slot: int, generation: int) -> Problem:
    """Draw the task that a slot works on in a generation."""
    task = family.sample_task(stream(seed, split, Channel.TASK, slot, generation))
    theta0 = family.sample_init(stream(seed, split, Channel.INIT, slot, generation), task)
    assert theta0.shape == (family.spec.size,), (theta0.shape, family.spec.size)
    return Problem(task, theta0, {})


@dataclass(frozen=True)
class WindowSampler:
    """Draws windows of tasks.

    Args:
        family: what is drawn; of the data split that is meant (:meth:`TaskFamily.for_split`).
        schedule: which trajectory each slot is on.
        seed: of the streams.
        split: of the streams.
        teacher: an optimizer that works on every task too, for comparison; none if not given.
    """

    family: TaskFamily
    schedule: Schedule
    seed: int
    split: Split
    teacher: Teacher | None = None
    _last: dict[int, tuple[int, Problem]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Each slot's generation and problem. Drawing is pure, so this memory changes nothing but the time."""

    def __call__(self, index: int, slots: range) -> Window:
        """Draw window ``index`` of these (global) slots."""
        phases = [self.schedule.phase(index, slot, self.seed, self.split) for slot in slots]
        problems = [self._problem(index, slot, phase) for slot, phase in zip(slots, phases, strict=True)]
        return Window(
            window_index=index,
            inner_step=np.array([phase.window * self.schedule.window for phase in phases]),
            reset=np.array([phase.reset for phase in phases]),
            task=_stack([problem.task for problem in problems]),
            theta0=_stack([problem.theta0 for problem in problems]),
            data=self._data(slots, phases, problems),
            window_length=self.schedule.window,
            horizon=np.array([phase.horizon for phase in phases]),
            teacher=self._taught(index, slots, problems),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": {}}  # another process draws for itself

    def _problem(self, index: int, slot: int, phase: Phase) -> Problem:
        """The problem of a slot, drawn once for all windows of its trajectory."""
        known, problem = self._last.get(slot, (None, None))
        if known != phase.generation or problem is None:
            problem = draw_problem(self.family, self.seed, self.split, slot, phase.generation)
            if self.teacher is not None:
                first = (phase.window - self._begun(index, slot)) * self.schedule.window
                steps = range(first, phase.horizon + 1)
                minibatches = [self._minibatch(slot, phase, problem, step) for step in steps]
                teacher = self.teacher(self.family, problem.task, problem.theta0, minibatches)
                problem = problem._replace(teacher=teacher)
            self._last[slot] = phase.generation, problem
        return problem

    def _minibatch(self, slot: int, phase: Phase, problem: Problem, step: int) -> Arrays:
        """What inner step ``step`` of a trajectory sees."""
        if not self.family.has_data:
            return {}
        rng = stream(self.seed, self.split, Channel.DATA, slot, phase.generation, step)
        return self.family.sample_data(rng, problem.task)

    def _data(self, slots: range, phases: Sequence[Phase], problems: Sequence[Problem]) -> Arrays:
        """Minibatches (K + 1, S, ...): one per inner step, and one for the loss after the last."""
        if not self.family.has_data:
            return {}
        rows = list(zip(slots, phases, problems, strict=True))

        def draw(k: int) -> Arrays:
            at = self.schedule.window
            return _stack([self._minibatch(*row, row[1].window * at + k) for row in rows])  # type: ignore[no-any-return]

        minibatches: Arrays = _stack([draw(k) for k in range(self.schedule.window + 1)])
        return minibatches

    def _begun(self, index: int, slot: int) -> int:
        """How many windows ago the slot began its trajectory, which need not have been with the first one."""
        phases = (self.schedule.phase(index - back, slot, self.seed, self.split) for back in range(index + 1))
        return next(back for back, phase in enumerate(phases) if phase.reset)

    def _taught(self, index: int, slots: range, problems: Sequence[Problem]) -> Arrays:
        """The window's part of what the teacher did, (K, S, ...)."""
        if self.teacher is None:
            return {}
        length = self.schedule.window
        counts = {"losses": length, "theta": length + 1}
        parts = []
        for slot, problem in zip(slots, problems, strict=True):
            first = self._begun(index, slot) * length
            parts.append({name: leaf[first:][: counts[name]] for name, leaf in problem.teacher.items()})
        return {name: np.stack([part[name] for part in parts], axis=1) for name in parts[0]}


def _stack(trees: Sequence[Any]) -> Any:
    """Stack arrays, or dicts of arrays, along a new first axis."""
    return tree_map(lambda *leaves: np.stack(leaves), trees[0], *trees[1:])
