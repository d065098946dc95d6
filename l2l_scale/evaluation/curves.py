"""Loss curves on held-out tasks: a rollout like any other, through the code path that trains.

S tasks, T inner steps, N coordinates, G points of a tuning grid. Slots are tasks here: slot s works on task
s of the split, once. A grid lies on the slot axis: the tasks of a chunk are repeated for every point, so a
whole sweep of hyper-parameters is one rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.optimizers.backend import Backend, accelerate
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks.base import TaskFamily, Tensors
from l2l_scale.tree import tree_map
from l2l_scale.unroll import Carry, InnerGradient, WindowBatch, begin, unroll

Point: TypeAlias = Mapping[str, float]
"""Hyper-parameters by name: one point of a grid."""

Build: TypeAlias = Callable[[dict[str, Tensor]], UpdateRule]
"""Makes the rule whose hyper-parameters have one value per slot, each of shape (S,)."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Tasks that no rule was trained on, and how they are run.

    Args:
        family: whose tasks they are.
        seed: of the tasks' streams.
        split: of the streams and of the data: TUNE or TEST (VALID for choosing checkpoints).
        num_tasks: S; tasks 0 … S − 1 of the split, so fewer tasks are the first of more tasks.
        inner_steps: T.
        window: inner steps whose minibatches are held in memory at once. No effect on the result.
        max_coordinates: upper limit of coordinates, over all slots, in one rollout (at least one slot).
            Bounds the memory. No effect on the result of rules that work element by element; matrix
            products, as in learned rules, may round differently by the number of their rows.
        device: where the rollouts run.
        backend: how learned rules are computed, see :data:`l2l_scale.optimizers.backend.Backend`.

    Raises:
        ValueError: if a number is not a whole number of at least 1.
    """

    family: TaskFamily
    seed: int
    split: Split
    num_tasks: int
    inner_steps: int
    window: int = 20
    max_coordinates: int = 1 << 15
    device: str = "cpu"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for name in ("num_tasks", "inner_steps", "window", "max_coordinates"):
            check_count(name, getattr(self, name))

    @cached_property
    def split_family(self) -> TaskFamily:
        """The family on the data of the split."""
        return self.family.for_split(self.split)

    @property
    def slots_at_once(self) -> int:
        """How many slots one rollout may have."""
        return max(1, self.max_coordinates // self.family.spec.size)

    def prepare(self) -> None:
        """Put the data of the split on the device."""
        self.split_family.prepare(torch.device(self.device))

    def accelerate(self, rule: UpdateRule) -> UpdateRule:
        """The rule for these tasks as the backend computes it; classic rules are computed as they are."""
        bound = rule.for_spec(self.family.spec)
        for parameter in rule.parameters():
            return accelerate(bound, self.backend, torch.device(self.device), parameter.dtype).rule
        return bound

    def sampler(self) -> WindowSampler:
        """Draws the windows; it remembers the tasks that it drew.

        The last window may reach beyond the last inner step.
        """
        deterministic = not self.family.has_data  # then nothing is drawn per inner step: one window does
        window = self.inner_steps if deterministic else min(self.window, self.inner_steps)
        horizon = math.ceil(self.inner_steps / window) * window
        schedule = Schedule(horizon=horizon, window=window, staggered=False)
        return WindowSampler(self.split_family, schedule, self.seed, self.split)

    def windows(self, sampler: WindowSampler, tasks: range, copies: int = 1) -> Iterator[WindowBatch]:
        """Windows of these tasks' trajectories, every task in ``copies`` neighbouring slots."""
        for index in range(sampler.schedule.windows_per_trajectory):
            yield _repeat(sampler(index, tasks).to_batch(), copies, torch.device(self.device))


class Run(NamedTuple):
    """What a rule did on some tasks."""

    losses: Tensor
    """f(θ_0) … f(θ_T), (T + 1, S)."""
    scores: Tensors
    """Figures of merit at θ_T by name, (S,) each; none where windows reach beyond T."""


def loss_curves(rule: UpdateRule, held_out: HeldOut, tasks: range | None = None) -> Tensor:
    """Losses f(θ_0) … f(θ_T) of every task, (T + 1, S), on the CPU.

    What goes astray stays astray: from its first non-finite loss on, a curve is +inf. With minibatches,
    f(θ_t) is the loss on the minibatch that inner step t + 1 sees.

    Args:
        rule: any rule; its hyper-parameters are the same for all tasks.
        held_out: the tasks.
        tasks: only these of them.
    """
    return curves_of_all([rule], held_out, range(held_out.num_tasks) if tasks is None else tasks)[0].losses


def curves_of_all(rules: Sequence[UpdateRule], held_out: HeldOut, tasks: range) -> list[Run]:
    """:func:`loss_curves` of several rules on the same tasks, which are drawn once, and where they end."""
    held_out.prepare()
    rules = [held_out.accelerate(rule) for rule in rules]
    parts: list[list[Run]] = [[] for _ in rules]
    for chunk in chunked(tasks, held_out.slots_at_once):
        sampler = held_out.sampler()
        for rule, part in zip(rules, parts, strict=True):
            losses, theta = _trajectories(rule, held_out, held_out.windows(sampler, chunk))
            part.append(Run(losses.cpu(), _scores(held_out, sampler, theta, chunk)))
    return [join(part) for part in parts]


def join(runs: Sequence[Run]) -> Run:
    """Runs of one rule on several ranges of tasks as one."""
    scores = {name: torch.cat([run.scores[name] for run in runs]) for name in runs[0].scores}
    return Run(torch.cat([run.losses for run in runs], dim=1), scores)


@torch.no_grad()
def _scores(held_out: HeldOut, sampler: WindowSampler, theta: Tensor, tasks: range) -> Tensors:
    """Figures of merit at the end points θ (S, N) of a chunk of tasks, on the CPU."""
    if sampler.schedule.horizon > held_out.inner_steps:
        return {}
    task = next(held_out.windows(sampler, tasks)).task
    return {name: value.cpu() for name, value in held_out.split_family.scores(theta, task).items()}


def end_points(rule: UpdateRule, held_out: HeldOut, tasks: range) -> Tensor:
    """Where a rule is after the last inner step of these tasks, θ_T (S, N), on the CPU."""
    held_out = replace(held_out, window=held_out.inner_steps)  # windows that reach beyond T would move θ on
    held_out.prepare()
    rule = held_out.accelerate(rule)
    chunks = chunked(tasks, held_out.slots_at_once)
    ends = [_trajectories(rule, held_out, held_out.windows(held_out.sampler(), chunk))[1] for chunk in chunks]
    return torch.cat(ends).cpu()


def sweep(build: Build, points: Sequence[Point], held_out: HeldOut) -> Tensor:
    """Final losses and sums of losses for every point of a grid, on the same tasks.

    Args:
        build: makes the rule from hyper-parameters with one value per slot.
        points: G points, all with the same names.
        held_out: the tasks.

    Returns:
        (2, G, S) in float64: f(θ_T) and f(θ_1) + … + f(θ_T); +inf where a trajectory went astray.
    """
    held_out.prepare()
    blocks = [
        points[chunk.start : chunk.stop] for chunk in chunked(range(len(points)), held_out.slots_at_once)
    ]
    return torch.cat([_sweep_block(build, block, held_out) for block in blocks], dim=1)


def _sweep_block(build: Build, points: Sequence[Point], held_out: HeldOut) -> Tensor:
    """The sweep of no more points than there may be slots at once; (2, G, S)."""
    columns = []
    for tasks in chunked(range(held_out.num_tasks), max(1, held_out.slots_at_once // len(points))):
        rule = build(_per_slot(points, len(tasks), held_out.device))
        windows = held_out.windows(held_out.sampler(), tasks, len(points))
        curves = _trajectories(rule, held_out, windows)[0].double()
        scores = torch.stack([curves[-1], curves[1:].sum(0)]).cpu()
        columns.append(scores.view(2, len(tasks), len(points)).mT)
    return torch.cat(columns, dim=2)


def _trajectories(
    rule: UpdateRule, held_out: HeldOut, windows: Iterator[WindowBatch]
) -> tuple[Tensor, Tensor]:
    """Run one block of slots window after window; losses (T + 1, slots), and θ (slots, N) in the end."""
    carry: Carry | None = None
    losses: list[Tensor] = []
    for batch in windows:
        carry = begin(rule, batch, carry, restart_diverged=False)
        rollout = unroll(rule, held_out.split_family, carry, batch, InnerGradient.NONE)
        if not losses:
            losses.append(rollout.carry.start_loss[None])
        losses.append(rollout.losses)
        carry = rollout.carry
    assert carry is not None, "a run has one window at least"
    return stay_astray(torch.cat(losses)[: held_out.inner_steps + 1]), carry.theta


def stay_astray(curves: Tensor) -> Tensor:
    """+inf from the first non-finite loss on; (T + 1, S)."""
    astray = (~curves.isfinite()).cummax(0).values
    return curves.masked_fill(astray, torch.inf)


def _repeat(batch: WindowBatch, copies: int, device: torch.device) -> WindowBatch:
    """Put every slot ``copies`` times next to itself, on the device."""

    def slots(axis: int) -> Callable[[Tensor], Tensor]:
        return lambda leaf: leaf.to(device).repeat_interleave(copies, axis)

    return batch._replace(
        inner_step=slots(0)(batch.inner_step),
        reset=slots(0)(batch.reset),
        task=tree_map(slots(0), batch.task),
        theta0=slots(0)(batch.theta0),
        data=tree_map(slots(1), batch.data),
    )


def _per_slot(points: Sequence[Point], tasks: int, device: str) -> dict[str, Tensor]:
    """Hyper-parameters over slots, (tasks · points,): the points of task 0, of task 1, …"""

    def column(name: str) -> Tensor:
        return torch.tensor([point[name] for point in points], dtype=torch.float64, device=device)

    return {name: column(name).repeat(tasks) for name in points[0]}


def chunked(indices: range, size: int) -> Iterator[range]:
    """Cut a range into ranges of up to ``size``."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
