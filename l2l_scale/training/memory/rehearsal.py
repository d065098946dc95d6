"""A rehearsal of meta-training on tensors without memory: what would be alive, and when most of it.

The module's own steps run on torch's meta device, where operations make shapes only, and a dispatch mode
below them counts the bytes of the storages that are alive. So next to nothing is modelled, and nothing is
allocated.

S slots, N coordinates, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from l2l_scale.optimizers import UpdateRule
from l2l_scale.optimizers.backend import Accelerated
from l2l_scale.rng import Split
from l2l_scale.sampling import Seat, SeatBatch, WindowSampler
from l2l_scale.training.data import WindowData
from l2l_scale.training.memory.live_bytes import META, RESIDENT, LiveBytes, Tag
from l2l_scale.training.module import MetaTraining
from l2l_scale.tree import Tree, tree_leaves, tree_map
from l2l_scale.unroll import WindowBatch

TRAINING, VALIDATION, CHECKPOINT = "a training window", "a validation window", "a checkpoint"

_PHI, _STATE, _VALID_STATE = (Tag("device", part) for part in ("φ and Adam", "slots", "validation's slots"))


def rehearse(
    model: MetaTraining,
    data: WindowData,
    accelerate: Callable[[UpdateRule], Accelerated],
    dtype: torch.dtype,
    live: LiveBytes,
    world_size: int,
) -> int:
    """Rehearse a window of training, validation, a second window, and a checkpoint.

    Args:
        model: the module; it is not touched.
        data: where its windows come from.
        accelerate: how the rule will be computed, for a copy of it on the meta device.
        dtype: of θ.
        live: counts.
        world_size: ranks that share the slots.

    Returns:
        bytes of what survives a window.
    """
    never = 1 << 62  # losses without content look like divergence
    module = _Module(deepcopy(model.rule), data.family, model.estimator, divergence_patience=never)
    module.to(META, dtype)
    seats = largest_seats(data, world_size)
    tasks = -(-data.valid_tasks // world_size)
    with live:
        for name, family in module.families.items():
            module.accelerated[name] = accelerate(module.rule.for_spec(family.spec))
        with live.counting(RESIDENT):
            for seat in seats:
                module.families[seat.member].prepare(META)
            for valid_family in module.valid_families.values():
                valid_family.prepare(META)
        adam = _start_adam(module, live)
        draws = [
            _Draw(live, data, Split.TRAIN, seat.member, len(seat.slots), seat.weight, dtype) for seat in seats
        ]
        _train(module, adam, draws, 0, live)
        for name in module.valid_families:
            _validate(module, _Draw(live, data, Split.VALID, name, tasks, 1.0, dtype), data, live)
        size = _train(module, adam, draws, 1, live)
        _checkpoint(module.carries, live)
    return size


def largest_seats(data: WindowData, world_size: int) -> tuple[Seat, ...]:
    """The seats of the rank with most coordinates in flight."""
    everyone = (data.seats(rank, world_size) for rank in range(world_size))
    return max(everyone, key=lambda seats: sum(coordinates_of(data, seats)))


def coordinates_of(data: WindowData, seats: tuple[Seat, ...]) -> list[int]:
    """Coordinates in flight in each seat: S · N."""
    return [len(seat.slots) * data.mixture.families[seat.member].spec.size for seat in seats]


class _Module(MetaTraining):
    """Meta-training without a trainer."""

    def log(self, *_: Any, **__: Any) -> None:
        """There is nowhere to log to."""


class _Draw:
    """Windows without content, drawn and converted as sampler and loader do it; keeps what they keep."""

    def __init__(
        self,
        live: LiveBytes,
        data: WindowData,
        split: Split,
        member: str,
        slots: int,
        weight: float,
        dtype: torch.dtype,
    ) -> None:
        self.live, self.split, self.slots, self.dtype = live, split, slots, dtype
        self.member, self.weight = member, weight
        family = data.mixture.for_split(split).families[member]
        teacher = data.teacher if split is Split.TRAIN else None
        sampler = WindowSampler(family, data.schedule, data.seed, split, teacher)
        self.one = sampler(0, range(1))  # one slot's, for shapes and types
        self.problems: list[Tensor] = []
        self.kept: list[Tensor] = []

    def __call__(self, index: int) -> SeatBatch:
        """The batch of a window."""
        return SeatBatch(self.member, self.weight, self._window(index))

    def _window(self, index: int) -> WindowBatch:
        with self.live.counting(Tag("host", "drawn windows")):
            if not self.problems:  # the sampler remembers them for the trajectory
                leaves = tree_leaves((self.one.task, self.one.theta0))
                self.problems = [self._array(leaf, 0) for leaf in leaves]
            data = [self._array(leaf, 1) for leaf in tree_leaves(self.one.data)]
            arrays = [torch.empty_like(array) for array in (*self.problems, *data)]  # stacked
            del data
            minibatches, teacher = (
                tree_map(lambda leaf: self._tensor(leaf, 1), tree)
                for tree in (self.one.data, self.one.teacher)
            )
            parts = self.one._replace(window_index=index, data={}, teacher={})._asdict()
            batch = WindowBatch(**tree_map(lambda leaf: self._tensor(leaf, 0), parts))
            batch = batch._replace(data=minibatches, teacher=teacher)
            # The training loader holds a window's arrays until the next ones are there.
            self.kept = arrays if self.split is Split.TRAIN else []
        if self.live.shared:
            return batch
        return WindowBatch(
            *tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tuple(batch))
        )

    def _array(self, leaf: Any, slot_axis: int) -> Tensor:
        like = torch.as_tensor(leaf)
        shape = [*like.shape[:slot_axis], self.slots, *like.shape[slot_axis + 1 :]]
        return torch.empty(shape, dtype=like.dtype, device=META)

    def _tensor(self, leaf: Any, slot_axis: int) -> Any:
        if isinstance(leaf, int):
            return leaf
        value = self._array(leaf, slot_axis)
        return value.to(self.dtype) if value.is_floating_point() else value


def _start_adam(module: MetaTraining, live: LiveBytes) -> torch.optim.Adam:
    """φ, its gradient and its moments."""
    with live.counting(_PHI):
        live.count(list(module.parameters()), _PHI)
        adam = torch.optim.Adam(module.parameters())
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)
        adam.step()
    return adam


def _train(
    module: MetaTraining, adam: torch.optim.Adam, draws: list[_Draw], index: int, live: LiveBytes
) -> int:
    """One window and its meta-step, in Lightning's order; the bytes of the slots' state after it."""
    live.phase = TRAINING
    output = module.training_step(tuple(draw(index) for draw in draws), index)
    adam.zero_grad()
    output["loss"].backward()
    adam.step()
    return live.move(tree_leaves(module.carries), _STATE)


def _validate(module: MetaTraining, draw: _Draw, data: WindowData, live: LiveBytes) -> None:
    """The first two windows of the held-out trajectories."""
    live.phase = VALIDATION
    module.on_validation_epoch_start()
    with torch.no_grad():
        for index in range(min(2, data.schedule.windows_per_trajectory)):
            module.validation_step((draw(index),), index)
            live.move(tree_leaves(module.valid_carry), _VALID_STATE)
        module.on_validation_epoch_end()


def _checkpoint(carries: Tree, live: LiveBytes) -> None:
    """Every rank puts a copy of its slots on the host, to write them."""
    live.phase = CHECKPOINT
    with live.counting(Tag("host", "checkpoint")):
        _ = torch.empty(sum(leaf.nbytes for leaf in tree_leaves(carries)), dtype=torch.uint8, device=META)
