"""Feeds windows to the trainer, and remembers where it is by one integer."""

from __future__ import annotations

from collections.abc import Iterator

from l2l_scale.checks import check_count
from l2l_scale.sampling.sampler import WindowSampler
from l2l_scale.unroll import WindowBatch


class WindowLoader:
    """An iterable over the windows of one epoch after another.

    The window counter is the only clock of a run. It is saved with a checkpoint (``state_dict``), and
    because the loader has a length, Lightning saves it in step with the optimizer.

    Args:
        sampler: draws the windows.
        slots: the (global) slots of this rank.
        windows_per_epoch: length of an epoch.
    """

    def __init__(self, sampler: WindowSampler, slots: range, windows_per_epoch: int) -> None:
        check_count("windows_per_epoch", windows_per_epoch)
        check_count("slots", len(slots))
        self.draw_window, self.slots, self.windows_per_epoch = sampler, slots, windows_per_epoch
        self.next_index = 0

    def __len__(self) -> int:
        return self.windows_per_epoch

    def __iter__(self) -> Iterator[WindowBatch]:
        # A resumed epoch ends where the interrupted one would have ended.
        for _ in range(self.windows_per_epoch - self.next_index % self.windows_per_epoch):
            window = self.draw_window(self.next_index, self.slots)
            self.next_index += 1
            yield window.to_batch()

    def state_dict(self) -> dict[str, int]:
        """The index of the next window."""
        return {"next_index": self.next_index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the window that :meth:`state_dict` was about to give."""
        self.next_index = state["next_index"]


class FixedWindows:
    """The first windows of some slots, the same ones every time: for validation.

    No ``DataLoader``, so that Lightning does not deal the windows of a trajectory out over the ranks.

    Args:
        sampler: draws the windows.
        slots: the (global) slots, one per task.
        windows: how many windows.
    """

    def __init__(self, sampler: WindowSampler, slots: range, windows: int) -> None:
        self.draw_window, self.slots, self.windows = sampler, slots, windows

    def __len__(self) -> int:
        return self.windows

    def __iter__(self) -> Iterator[WindowBatch]:
        return (self.draw_window(index, self.slots).to_batch() for index in range(self.windows))
