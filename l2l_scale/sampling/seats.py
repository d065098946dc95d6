"""Which slots of which families a rank holds, and the sampler that draws all of them.

Slots are global, 0 … S − 1 over all ranks. Neither the number of ranks nor that of the processes which draw
changes what is drawn in a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from l2l_scale.sampling.sampler import Window, WindowSampler, join
from l2l_scale.tasks.mixture import Mixture, divide
from l2l_scale.unroll import WindowBatch


class Seat(NamedTuple):
    """The slots of one family on one rank."""

    member: str
    """The family's name in the mixture."""
    slots: range
    weight: float
    """Of the mean over these slots, so that the mean over all ranks is the mixture's."""


class SeatBatch(NamedTuple):
    """What a window needs in one seat. A rank's batch has one for each of its seats."""

    member: str
    weight: float
    window: WindowBatch


Batch: TypeAlias = tuple[SeatBatch, ...]
"""One window in all slots of a rank: what Lightning calls a batch."""

Pieces: TypeAlias = list[list[Window]]
"""A window as it is drawn: for every seat, the pieces that its slots were drawn in."""

Draw: TypeAlias = Callable[[int], Pieces]
"""From the window's index to the window."""


def seats_of(mixture: Mixture, total_slots: int, rank: int, world_size: int) -> tuple[Seat, ...]:
    """The seats of a rank.

    Args:
        mixture: the families.
        total_slots: S of all ranks.
        rank: 0 … world_size − 1.
        world_size: the number of ranks.

    Raises:
        ValueError: if the slots of a family cannot be dealt out evenly, or there are too few of anything.
    """
    slots, weights = mixture.slots(total_slots), mixture.weights
    if mixture.placement == "every_rank":
        return tuple(
            Seat(name, _share_of(name, slots[name], rank, world_size), weight)
            for name, weight in weights.items()
        )
    ranks = divide(world_size, {name: len(range_) for name, range_ in slots.items()}, "number of ranks")
    # Those of all ranks, so that every one refuses what any one would.
    everyone = [
        Seat(name, _share_of(name, slots[name], number, count), weights[name] * world_size / count)
        for name, count in ranks.items()
        for number in range(count)
    ]
    return (everyone[rank],)


def _share_of(name: str, slots: range, rank: int, ranks: int) -> range:
    """The slots of one of the ranks that share them."""
    if len(slots) % ranks:
        whose = f" of {name}" if name else ""
        fits = max(round(len(slots) / ranks), 1) * ranks
        raise ValueError(
            f"slots{whose} ({len(slots)}) must be a multiple of the ranks that share them ({ranks}): every "
            f"rank has as many. data.slots counts those of all ranks; {fits}{whose} would do"
        )
    count = len(slots) // ranks
    return range(slots.start + rank * count, slots.start + (rank + 1) * count)


@dataclass(frozen=True)
class RankSampler:
    """Draws windows in all slots of a rank: a pure function of the window's index.

    Args:
        samplers: one for each seat.
        slots: the slots of each seat; a range may be empty.
    """

    samplers: tuple[WindowSampler, ...]
    slots: tuple[range, ...]

    def __call__(self, index: int) -> Pieces:
        """Draw window ``index``, each seat in one piece."""
        return [
            [sampler(index, slots)] if slots else []
            for sampler, slots in zip(self.samplers, self.slots, strict=True)
        ]

    def part(self, number: int, parts: int) -> RankSampler:
        """The sampler of the ``number``-th of ``parts`` neighbouring shares of every seat's slots."""

        def cut(slots: range) -> range:
            edges = [slots.start + len(slots) * n // parts for n in (number, number + 1)]
            return range(*edges)

        return RankSampler(self.samplers, tuple(cut(slots) for slots in self.slots))

    @property
    def max_slots(self) -> int:
        """Slots of the seat that has most."""
        return max(map(len, self.slots))


def to_batch(
    seats: Sequence[Seat], pieces: Pieces, dtype: torch.dtype = torch.float32, pin_memory: bool = False
) -> Batch:
    """Put the pieces of a window together; arguments as for :func:`join`."""
    return tuple(
        SeatBatch(seat.member, seat.weight, join(drawn, dtype, pin_memory))
        for seat, drawn in zip(seats, pieces, strict=True)
    )
