"""Which part of which trajectory every slot works on in every window: a pure function, no state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from l2l_scale.checks import check_count
from l2l_scale.rng import Split
from l2l_scale.sampling.curriculum import Curriculum


class Phase(NamedTuple):
    """Where a slot stands in a window."""

    generation: int
    """The running number of the slot's trajectory; it never falls, but a curriculum may leave gaps."""
    window: int
    """The window within the trajectory, 0 … W − 1."""
    horizon: int
    """T = W · K of this trajectory."""
    reset: bool
    """Whether a trajectory starts here."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Trajectories of ``horizon`` inner steps in windows of ``window``.

    Args:
        horizon: T, inner steps spent on one task; with a curriculum the horizon that it works towards, which
            validation and evaluation use.
        window: K, inner steps per window; must divide the horizon.
        staggered: slots stand at different points of their trajectories at any time, which learns faster
            than lockstep and shows φ early and late steps in every meta-step. A number says by how many
            windows a slot is ahead of the one before it, true is 1: with few slots of long trajectories
            only W over the number of slots shows all of a trajectory at once. The first trajectory of
            a slot that starts in the middle is cut short. (Random horizons have random starts instead.)
        curriculum: other horizons than this one, by the window counter or at random.

    Raises:
        ValueError: if a number is below 1 (of staggered: below 0) or the window does not divide a horizon.
    """

    horizon: int
    window: int
    staggered: bool | int = True
    curriculum: Curriculum | None = None

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon)
        check_count("window", self.window)
        check_divides("horizon", self.horizon, self.window)
        if not isinstance(self.staggered, bool):
            check_count("staggered", self.staggered, least=0)
        if self.curriculum is not None:
            for horizon in self.curriculum.horizons(self.window):
                check_divides("curriculum's horizon", horizon, self.window)

    @property
    def windows_per_trajectory(self) -> int:
        """W of a trajectory of ``horizon`` inner steps."""
        return self.horizon // self.window

    @property
    def horizons(self) -> tuple[int, ...]:
        """All T that trajectories may have, in rising order."""
        if self.curriculum is None:
            return (self.horizon,)
        return tuple(sorted(set(self.curriculum.horizons(self.window))))

    def plain(self) -> Schedule:
        """The same in lockstep and without a curriculum: what rules are validated and evaluated on."""
        return replace(self, staggered=False, curriculum=None)

    def phase(self, index: int, slot: int, seed: int = 0, split: Split = Split.TRAIN) -> Phase:
        """Where the (global) slot stands in window ``index``, both counted from 0.

        Args:
            index: the window counter.
            slot: the slot.
            seed: of the streams that random horizons are drawn from.
            split: of these streams.
        """
        if self.curriculum is not None:
            place = self.curriculum.place(index, slot, self.window, self.staggered, seed, split)
            starts = place.window == 0 or place.restart
            return Phase(place.generation, place.window, place.horizon, starts)
        generation, window = cycle(index, slot, self.windows_per_trajectory, self.staggered)
        return Phase(generation, window, self.horizon, reset=window == 0 or index == 0)


def cycle(index: int, slot: int, count: int, stagger: int) -> tuple[int, int]:
    """Generation and window of a slot whose trajectories have ``count`` windows each."""
    return divmod(index + slot * stagger % count, count)


def check_divides(name: str, horizon: int, window: int) -> None:
    """Raise ``ValueError`` unless a trajectory is made of whole windows."""
    if horizon % window:
        fits = [w for w in range(1, horizon + 1) if horizon % w == 0]
        near = min(fits, key=lambda w: abs(w - window))
        raise ValueError(
            f"{name} ({horizon}) must be a multiple of window ({window}); "
            f"the nearest window that fits is {near}"
        )
