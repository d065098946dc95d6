"""Which part of which trajectory every slot works on in every window: a pure function, no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from l2l_scale.checks import check_count


class Phase(NamedTuple):
    """Where a slot stands in a window."""

    generation: int
    """The running number of the slot's trajectory."""
    window: int
    """The window within the trajectory, 0 … W − 1."""
    reset: bool
    """Whether a trajectory starts here."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Trajectories of ``horizon`` inner steps in windows of ``window``.

    Args:
        horizon: T, inner steps spent on one task.
        window: K, inner steps per window; must divide the horizon.
        staggered: slots stand at different points of their trajectories at any time, which learns faster
            than lockstep and shows φ early and late steps in every meta-step. The first trajectory of
            a slot that starts in the middle is cut short.

    Raises:
        ValueError: if a number is below 1 or the window does not divide the horizon.
    """

    horizon: int
    window: int
    staggered: bool = True

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon)
        check_count("window", self.window)
        if self.horizon % self.window:
            fits = [w for w in range(1, self.horizon + 1) if self.horizon % w == 0]
            near = min(fits, key=lambda w: abs(w - self.window))
            raise ValueError(
                f"horizon ({self.horizon}) must be a multiple of window ({self.window}); "
                f"the nearest window that fits is {near}"
            )

    @property
    def windows_per_trajectory(self) -> int:
        """W."""
        return self.horizon // self.window

    def phase(self, index: int, slot: int) -> Phase:
        """Where the (global) slot stands in window ``index``, both counted from 0."""
        count = self.windows_per_trajectory
        generation, window = divmod(index + (slot % count if self.staggered else 0), count)
        return Phase(generation, window, reset=window == 0 or index == 0)
