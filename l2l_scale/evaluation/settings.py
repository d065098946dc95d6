"""How rules are compared: the settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from l2l_scale.checks import check_count
from l2l_scale.cores import available_cores
from l2l_scale.evaluation.baselines import RATES_PER_DECADE, Baseline, choose_baselines
from l2l_scale.evaluation.cache import default_folder
from l2l_scale.optimizers.backend import Backend, check_backend
from l2l_scale.tasks.base import TaskFamily

HELD_OUT = "held-out"
"""Name of the test on the family of meta-training."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How rules are compared with tuned baselines.

    Args:
        num_tasks: held-out tasks.
        num_tuning_tasks: tasks that baselines are tuned on; none of them is a held-out one.
        num_reference_tasks: how many of the held-out tasks BFGS, L-BFGS and conjugate gradients run on, which
            are slow; 0 leaves them out. Families with minibatches never have them.
        num_shift_tasks: held-out tasks of every shifted distribution.
        num_shift_tuning_tasks: tasks of every shifted distribution that baselines are tuned on.
        horizons: inner steps that baselines are tuned for and optimizers are compared at; several give a
            report each. The horizon of meta-training if not given.
        inner_steps: length of the run; five horizons if not given, and as long as each of several.
        shift_inner_steps: the same on shifted distributions; two horizons if not given, and as long as
            each of several.
        test_seed: of the held-out tasks. Splits never share tasks, whatever the seeds.
        tuning_seed: of the tuning tasks.
        shifts: shifted distributions by name.
        baselines: names of the baselines; if not given all but those of ``baselines.BY_NAME_ONLY``.
        rates_per_decade: how finely learning rates of baselines are tuned in the end: 16 differ by 15 %. An
            even number; 4, for tasks of minutes each, takes a third of the time.
        window: inner steps whose minibatches are in memory at once.
        max_coordinates: coordinates in one block of tasks; see :class:`HeldOut`.
        num_workers: processes; one per CPU core if not given. On a GPU always this one process.
        device: where rules run.
        backend: how learned rules are computed, see :data:`l2l_scale.optimizers.backend.Backend`.
        cache: keep results of tuning, and use those of an earlier run with the same settings and code.
        cache_folder: where they are kept; ``~/.cache/l2l_scale`` if not given.

    Raises:
        ValueError: if a number is too small, a baseline unknown, the rates per decade are odd, or a shift is
            called "held-out".
    """

    num_tasks: int = 4096
    num_tuning_tasks: int = 2048
    num_reference_tasks: int = 256
    num_shift_tasks: int = 1024
    num_shift_tuning_tasks: int = 1024
    horizons: list[int] | None = None
    inner_steps: int | None = None
    shift_inner_steps: int | None = None
    test_seed: int = 0
    tuning_seed: int = 0
    shifts: dict[str, TaskFamily] | None = None
    baselines: list[str] | None = None
    rates_per_decade: int = RATES_PER_DECADE
    window: int = 20
    max_coordinates: int = 1 << 15
    num_workers: int | None = None
    device: str = "cpu"
    backend: Backend = "auto"
    cache: bool = True
    cache_folder: str | None = None

    def __post_init__(self) -> None:
        positive = ("num_tasks", "num_tuning_tasks", "num_shift_tasks", "num_shift_tuning_tasks")
        optional = ("inner_steps", "shift_inner_steps", "num_workers")
        given = [name for name in optional if getattr(self, name) is not None]
        for name in (*positive, "window", "max_coordinates", *given):
            check_count(name, getattr(self, name))
        for horizon in self.horizons or ():
            check_count("horizons", horizon)
        check_count("num_reference_tasks", self.num_reference_tasks, least=0)
        choose_baselines(self.baselines, self.rates_per_decade)
        check_backend(self.backend)
        if HELD_OUT in (self.shifts or {}):
            raise ValueError(
                f"shifts must not be called {HELD_OUT!r}, the name of the family of meta-training"
            )

    def each_horizon(self, horizon: int) -> dict[int, Evaluation]:
        """The settings for each of the horizons; ``horizon`` is that of meta-training."""
        if self.horizons is None or len(self.horizons) == 1:
            return {(self.horizons or [horizon])[0]: self}
        return {
            each: replace(
                self,
                inner_steps=self.inner_steps or each,
                shift_inner_steps=self.shift_inner_steps or each,
            )
            for each in self.horizons
        }

    @property
    def opponents(self) -> list[Baseline]:
        """The baselines."""
        return choose_baselines(self.baselines, self.rates_per_decade)

    @property
    def cache_path(self) -> Path | None:
        """The folder of kept results, if any are kept."""
        if not self.cache:
            return None
        return Path(self.cache_folder) if self.cache_folder else default_folder() / "tuning"

    @property
    def workers(self) -> int:
        """How many processes work."""
        if torch.device(self.device).type != "cpu":
            return 1
        return self.num_workers or available_cores()
