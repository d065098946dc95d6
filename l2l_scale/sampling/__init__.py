"""Schedules of trajectories, and the windows drawn for them (floor 3)."""

from l2l_scale.sampling.loader import FixedWindows, WindowLoader
from l2l_scale.sampling.sampler import Window, WindowSampler
from l2l_scale.sampling.schedule import Phase, Schedule

__all__ = ["FixedWindows", "Phase", "Schedule", "Window", "WindowLoader", "WindowSampler"]
