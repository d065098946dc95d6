"""Schedules of trajectories, and the windows drawn for them (floor 3)."""

from l2l_scale.sampling.curriculum import Curriculum, RandomHorizons, StagedHorizons
from l2l_scale.sampling.loader import FixedWindows, WindowLoader
from l2l_scale.sampling.sampler import Window, WindowSampler, join
from l2l_scale.sampling.schedule import Phase, Schedule
from l2l_scale.sampling.seats import Batch, RankSampler, Seat, SeatBatch, seats_of, to_batch
from l2l_scale.sampling.settings import PoolSettings
from l2l_scale.sampling.teacher import Teacher

__all__ = [
    "Batch",
    "Curriculum",
    "FixedWindows",
    "Phase",
    "PoolSettings",
    "RandomHorizons",
    "RankSampler",
    "Schedule",
    "Seat",
    "SeatBatch",
    "StagedHorizons",
    "Teacher",
    "Window",
    "WindowLoader",
    "WindowSampler",
    "join",
    "seats_of",
    "to_batch",
]
