"""Schedules of trajectories, and the windows drawn for them (floor 3)."""

from l2l_scale.sampling.loader import WindowDataset, WindowLoader
from l2l_scale.sampling.sampler import Window, WindowSampler
from l2l_scale.sampling.schedule import Phase, Schedule

__all__ = ["Phase", "Schedule", "Window", "WindowDataset", "WindowLoader", "WindowSampler"]
