"""The Lightning data module: windows for training, whole trajectories of held-out tasks for validation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L

from l2l_scale.checks import check_count
from l2l_scale.rng import Split
from l2l_scale.sampling import FixedWindows, Schedule, WindowLoader, WindowSampler
from l2l_scale.tasks import TaskFamily


class WindowData(L.LightningDataModule):
    """Windows of sampled tasks.

    Args:
        family: the tasks.
        horizon: T, inner steps spent on one task.
        window: K, inner steps per window (= per meta-step); must divide the horizon.
        slots: S, tasks in flight per rank.
        staggered: whether slots stand at different points of their trajectories, which learns faster.
        seed: of the streams of training and validation tasks (their splits keep them apart).
        windows_per_epoch: windows between two validations (and checkpoints).
        valid_tasks: held-out tasks that choose the checkpoint.

    Raises:
        ValueError: if a number is below 1 or the window does not divide the horizon.
    """

    def __init__(
        self,
        family: TaskFamily,
        horizon: int = 100,
        window: int = 20,
        slots: int = 128,
        staggered: bool = True,
        seed: int = 0,
        windows_per_epoch: int = 100,
        valid_tasks: int = 512,
    ) -> None:
        super().__init__()
        check_count("slots", slots)
        check_count("windows_per_epoch", windows_per_epoch)
        check_count("valid_tasks", valid_tasks)
        self.family = family
        self.schedule = Schedule(horizon=horizon, window=window, staggered=staggered)
        self.slots, self.seed = slots, seed
        self.windows_per_epoch, self.valid_tasks = windows_per_epoch, valid_tasks

    def train_dataloader(self) -> WindowLoader:
        """The windows of this rank's slots, ``range(rank · S, (rank + 1) · S)``."""
        rank = 0 if self.trainer is None else self.trainer.global_rank
        family = self.family.for_split(Split.TRAIN)
        sampler = WindowSampler(family, self.schedule, self.seed, Split.TRAIN)
        slots = range(rank * self.slots, (rank + 1) * self.slots)
        return WindowLoader(sampler, slots, self.windows_per_epoch)

    def val_dataloader(self) -> FixedWindows:
        """One trajectory on every validation task, in lockstep; the same every time and on every rank."""
        lockstep = replace(self.schedule, staggered=False)
        sampler = WindowSampler(self.family.for_split(Split.VALID), lockstep, self.seed, Split.VALID)
        return FixedWindows(sampler, range(self.valid_tasks), lockstep.windows_per_trajectory)

    def describe(self, world_size: int) -> dict[str, Any]:
        """What the stream of windows depends on; a run can only be resumed with the same."""
        schedule = self.schedule
        return {
            "family": repr(self.family),
            "horizon": schedule.horizon,
            "window": schedule.window,
            "staggered": schedule.staggered,
            "slots of all ranks": self.slots * world_size,
            "seed": self.seed,
        }
