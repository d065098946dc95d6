"""Horizons that change over a run: pure functions of the window counter, as everything in a stream.

T inner steps of a trajectory, K of a window, W = T / K windows of a trajectory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from l2l_scale.checks import check_count
from l2l_scale.rng import Channel, Split, stream


class Place(NamedTuple):
    """Where a slot stands in a window."""

    generation: int
    window: int
    """Within the trajectory."""
    horizon: int
    """T of the trajectory."""
    restart: bool
    """Whether a trajectory starts here though its first windows were left out."""


class Curriculum(ABC):
    """Says how long every trajectory is."""

    @abstractmethod
    def horizons(self, window: int) -> Sequence[int]:
        """All T that may occur with windows of K inner steps."""

    @abstractmethod
    def place(self, index: int, slot: int, window: int, stagger: int, seed: int, split: Split) -> Place:
        """Where the (global) slot stands in window ``index``.

        Args:
            index: the window counter of the run.
            slot: the slot.
            window: K.
            stagger: windows by which every slot is ahead of the one before it; 0 in lockstep.
            seed: of the streams.
            split: of the streams.
        """


@dataclass(frozen=True, kw_only=True)
class StagedHorizons(Curriculum):
    """One horizon after another, usually longer and longer: easy trajectories first.

    Where a stage begins, every slot starts a new trajectory.

    Args:
        stages: T of each.
        starts: the window at which each stage begins; the first is 0.

    Raises:
        ValueError: if the two lists do not fit together, or the starts do not rise from 0.
    """

    stages: tuple[int, ...] = (100, 200, 500, 1000)
    starts: tuple[int, ...] = (0, 1000, 2000, 3000)

    def __post_init__(self) -> None:
        for name in ("stages", "starts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list would not be hashable
        for stage, horizon in enumerate(self.stages):
            check_count(f"stages[{stage}]", horizon)
        if not self.starts or len(self.starts) != len(self.stages):
            raise ValueError(
                f"starts ({list(self.starts)}) must have one window for each of the {len(self.stages)} stages"
            )
        if self.starts[0] != 0 or any(b <= a for a, b in pairwise(self.starts)):
            raise ValueError(f"starts ({list(self.starts)}) must begin with 0 and rise")

    def horizons(self, window: int) -> tuple[int, ...]:
        """Those of the stages."""
        return self.stages

    def place(self, index: int, slot: int, window: int, stagger: int, seed: int, split: Split) -> Place:
        """As within a run that began where the stage did; generations go on from those before."""
        stage = bisect_right(self.starts, index) - 1
        horizon, local = self.stages[stage], index - self.starts[stage]
        count = horizon // window
        generation, place = divmod(local + slot * stagger % count, count)
        before = sum(self._generations(earlier, window) for earlier in range(stage))
        return Place(before + generation, place, horizon, restart=local == 0)

    def _generations(self, stage: int, window: int) -> int:
        """More than any slot starts in a stage, whatever its stagger."""
        count = self.stages[stage] // window
        return (self.starts[stage + 1] - self.starts[stage]) // count + 2


@dataclass(frozen=True, kw_only=True)
class RandomHorizons(Curriculum):
    """A horizon per trajectory, log-uniform between two: no horizon is one that φ can rely on.

    Drawn in strata: of every ``strata`` trajectories of a slot, each has another quantile of the
    distribution, in random order. So a round of them has a fixed number of windows, and any window can be
    found without walking through those before.

    Args:
        low: least T.
        high: largest T.
        strata: how many horizons there are between them.

    Raises:
        ValueError: if a number is below 1 or low is above high.
    """

    low: int = 100
    high: int = 1000
    strata: int = 8

    def __post_init__(self) -> None:
        for name in ("low", "high", "strata"):
            check_count(name, getattr(self, name))
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must be at most high ({self.high})")

    def horizons(self, window: int) -> tuple[int, ...]:
        """The quantiles, rounded to whole windows (at least one)."""
        steps = (np.arange(self.strata) + 0.5) / self.strata
        quantiles = np.exp(math.log(self.low) + steps * math.log(self.high / self.low))
        return tuple(window * max(1, round(quantile / window)) for quantile in quantiles.tolist())

    def place(self, index: int, slot: int, window: int, stagger: int, seed: int, split: Split) -> Place:
        """The round that the window falls into, and the trajectory within the round."""
        horizons = self.horizons(window)
        windows = sum(horizons) // window
        offset = _offset(seed, split, slot, windows) if stagger else 0
        round_, position = divmod(index + offset, windows)
        order = _order(seed, split, slot, round_, self.strata)
        ends = list(accumulate(horizons[stratum] // window for stratum in order))
        place = bisect_right(ends, position)
        horizon = horizons[order[place]]
        within = position - (ends[place] - horizon // window)
        return Place(round_ * self.strata + place, within, horizon, restart=index == 0)


@lru_cache(maxsize=1 << 16)
def _order(seed: int, split: Split, slot: int, round_: int, strata: int) -> tuple[int, ...]:
    """The order of the strata in a round of a slot."""
    return tuple(stream(seed, split, Channel.HORIZON, slot, round_).permutation(strata).tolist())


@lru_cache(maxsize=1 << 16)
def _offset(seed: int, split: Split, slot: int, windows: int) -> int:
    """Where in its first round a slot begins."""
    return int(stream(seed, split, Channel.HORIZON, slot, 0, 1).integers(windows))
