"""The Lightning data module: windows for training, whole trajectories of held-out tasks for validation."""

from __future__ import annotations

from typing import Any

import lightning as L

from l2l_scale.checks import check_count
from l2l_scale.deploy import describe_rule
from l2l_scale.optimizers import UpdateRule
from l2l_scale.rng import STREAM_FORMAT, Split
from l2l_scale.sampling import (
    Curriculum,
    FixedWindows,
    PoolSettings,
    RankSampler,
    Schedule,
    Seat,
    Teacher,
    WindowLoader,
    WindowSampler,
    seats_of,
)
from l2l_scale.tasks import Mixture, TaskFamily
from l2l_scale.training.actors import Actors


class WindowData(L.LightningDataModule):
    """Windows of sampled tasks.

    Args:
        family: the tasks, or a mixture of several families.
        horizon: T, inner steps spent on one task.
        window: K, inner steps per window (= per meta-step); must divide the horizon.
        slots: S, tasks in flight on all ranks together; every rank has as many of them. So the same
            configuration trains the same rule on any number of ranks that divides it.
        staggered: whether slots stand at different points of their trajectories, which learns faster; or by
            how many windows each is ahead of the one before it, true being 1.
        seed: of the streams of training and validation tasks (their splits keep them apart).
        windows_per_epoch: windows between two validations.
        valid_tasks: held-out tasks of each family that choose the checkpoint.
        curriculum: horizons in training that change by the window counter, or at random; validation and
            evaluation keep ``horizon``.
        teacher: a hand-designed optimizer that works on every training task too, for a meta-loss that
            compares with it. Its inner steps are made where windows are drawn.
        teacher_iterates: keep the points that the teacher passed as well, for imitation.
        pool: how windows are drawn; in this process if not given.

    Raises:
        ValueError: if a number is below 1, the window does not divide the horizon, or the teacher cannot be
            described in a checkpoint.
    """

    def __init__(
        self,
        family: TaskFamily | Mixture,
        horizon: int = 100,
        window: int = 20,
        slots: int = 128,
        staggered: bool | int = True,
        seed: int = 0,
        windows_per_epoch: int = 100,
        valid_tasks: int = 512,
        curriculum: Curriculum | None = None,
        teacher: UpdateRule | None = None,
        teacher_iterates: bool = False,
        pool: PoolSettings | None = None,
    ) -> None:
        super().__init__()
        check_count("slots", slots)
        check_count("windows_per_epoch", windows_per_epoch)
        check_count("valid_tasks", valid_tasks)
        self.family, self.mixture = family, Mixture.of(family)
        self.schedule = Schedule(horizon=horizon, window=window, staggered=staggered, curriculum=curriculum)
        self.slots, self.seed = slots, seed
        self.windows_per_epoch, self.valid_tasks = windows_per_epoch, valid_tasks
        self.teacher = None if teacher is None else Teacher(teacher, teacher_iterates)
        self.pool = PoolSettings() if pool is None else pool
        self.actors = Actors(self.pool)

        self.describe()  # a teacher that no file can describe is refused now, not at the first checkpoint

    def seats(self, rank: int, world_size: int) -> tuple[Seat, ...]:
        """What a rank works on.

        Raises:
            ValueError: if the slots cannot be dealt out evenly.
        """
        return seats_of(self.mixture, self.slots, rank, world_size)

    def sampler(self, seats: tuple[Seat, ...]) -> RankSampler:
        """Draws what a rank works on."""
        families = self.mixture.for_split(Split.TRAIN).families
        samplers = tuple(
            WindowSampler(families[seat.member], self.schedule, self.seed, Split.TRAIN, self.teacher)
            for seat in seats
        )
        return RankSampler(samplers, tuple(seat.slots for seat in seats))

    def train_dataloader(self) -> WindowLoader:
        """Collective, if there are actors. The windows of this rank's slots."""
        rank, world_size, on_gpu = 0, 1, False
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            on_gpu = self.trainer.strategy.root_device.type == "cuda"
        seats = self.seats(rank, world_size)
        sampler = self.sampler(seats)
        draw = self.actors.start(sampler, self.trainer) if self.pool.num_actors else sampler
        return WindowLoader(draw, seats, self.windows_per_epoch, pin_memory=on_gpu)

    def val_dataloader(self) -> FixedWindows:
        """One trajectory on every validation task, in lockstep; the same every time. Ranks share them.

        Each rank has as many; where that does not come out even, the last ones are beyond ``valid_tasks``.
        """
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        share, plain = -(-self.valid_tasks // world_size), self.schedule.plain()
        families = self.mixture.for_split(Split.VALID).families
        samplers = {
            name: WindowSampler(family, plain, self.seed, Split.VALID) for name, family in families.items()
        }
        return FixedWindows(samplers, range(rank * share, (rank + 1) * share), plain.windows_per_trajectory)

    def teardown(self, stage: str) -> None:
        """Collective, if there are actors. End them."""
        if self.trainer is not None:
            self.actors.stop_together(self.trainer)

    def on_exception(self, exception: BaseException) -> None:
        """End the actors, after an error and on Ctrl-C too."""
        self.actors.stop()

    def describe(self) -> dict[str, Any]:
        """What the stream of windows depends on; a run can only be resumed with the same."""
        schedule = self.schedule
        return {
            "family": repr(self.family),
            "horizon": schedule.horizon,
            "window": schedule.window,
            "staggered": schedule.staggered,
            "curriculum": repr(schedule.curriculum),
            "teacher": None if self.teacher is None else describe_rule(self.teacher.rule),
            "slots": self.slots,
            "seed": self.seed,
            "windows_per_epoch": self.windows_per_epoch,
            "valid_tasks": self.valid_tasks,
            "stream_format": STREAM_FORMAT,
        }
