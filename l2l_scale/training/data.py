"""The Lightning data module: windows for training, whole trajectories of held-out tasks for validation."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
from torch.utils.data import DataLoader

from l2l_scale.checks import check_count
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowDataset, WindowLoader, WindowSampler
from l2l_scale.tasks import TaskFamily
from l2l_scale.unroll import WindowBatch


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

    def val_dataloader(self) -> DataLoader[WindowBatch]:
        """The windows of one trajectory on every held-out task, in lockstep; the same ones every time."""
        lockstep = replace(self.schedule, staggered=False)
        sampler = WindowSampler(self.family.for_split(Split.VALID), lockstep, self.seed, Split.VALID)
        windows = WindowDataset(sampler, range(self.valid_tasks), lockstep.windows_per_trajectory)
        return DataLoader(windows, batch_size=None)
