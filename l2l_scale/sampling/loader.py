"""Feeds windows to the trainer, and remembers where it is by one integer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from l2l_scale.checks import check_count
from l2l_scale.sampling.sampler import WindowSampler
from l2l_scale.sampling.seats import Batch, Draw, Seat, SeatBatch, to_batch


class WindowLoader:
    """An iterable over the windows of one epoch after another.

    The window counter is the only clock of a run. It is saved with a checkpoint (``state_dict``), and
    because the loader has a length, Lightning saves it in step with the optimizer.

    Args:
        draw: draws the windows: a :class:`~l2l_scale.sampling.RankSampler`, in this process, or a
            :class:`~l2l_scale.sampling.pool.SamplerPool`, ahead and in others.
        seats: of this rank.
        windows_per_epoch: length of an epoch.
        pin_memory: put batches where a GPU can fetch them while the CPU goes on.
    """

    def __init__(
        self, draw: Draw, seats: Sequence[Seat], windows_per_epoch: int, pin_memory: bool = False
    ) -> None:
        check_count("windows_per_epoch", windows_per_epoch)
        for seat in seats:
            check_count("slots", len(seat.slots))
        self.draw, self.seats, self.windows_per_epoch = draw, tuple(seats), windows_per_epoch
        self.pin_memory = pin_memory
        self.next_index = 0
        self.waited = 0.0
        """Seconds that the trainer has waited for windows so far."""

    def __len__(self) -> int:
        return self.windows_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        # A resumed epoch ends where the interrupted one would have ended.
        for _ in range(self.windows_per_epoch - self.next_index % self.windows_per_epoch):
            start = time.perf_counter()
            batch = to_batch(self.seats, self.draw(self.next_index), pin_memory=self.pin_memory)
            self.waited += time.perf_counter() - start
            self.next_index += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The index of the next window."""
        return {"next_index": self.next_index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the window that :meth:`state_dict` was about to give."""
        self.next_index = state["next_index"]


class FixedWindows:
    """The first windows of some tasks of every family, the same ones every time: for validation.

    All windows of a family come in order, then those of the next. No ``DataLoader``, so that Lightning does
    not deal the windows of a trajectory out over the ranks.

    Args:
        samplers: by the family's name in the mixture.
        slots: the (global) slots of this rank, one per task; the same of every family.
        windows: how many windows of each.
    """

    def __init__(self, samplers: dict[str, WindowSampler], slots: range, windows: int) -> None:
        self.samplers, self.slots, self.windows = samplers, slots, windows

    def __len__(self) -> int:
        return self.windows * len(self.samplers)

    def __iter__(self) -> Iterator[Batch]:
        for name, sampler in self.samplers.items():
            for index in range(self.windows):
                yield (SeatBatch(name, 1.0, sampler(index, self.slots).to_batch()),)
