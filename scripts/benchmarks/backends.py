"""The backends that are compared, roughly what they need, and the commands that measure them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import sizes

REFERENCE = "eager"
"""What ratios refer to, where it is measured."""


class Cost(NamedTuple):
    """What a meta-step costs, roughly: for the time left, and to refuse what cannot fit."""

    rate: float
    """Coordinate-steps per second of one core."""
    bytes: float
    """Per coordinate-step."""
    start: float = 4.0
    """Seconds until the first meta-step."""


COSTS = {
    "eager": Cost(400e3, 1900),
    "compiled": Cost(500e3, 1400, 40),
    "fused": Cost(2200e3, 65),
    "fused-bf16": Cost(2500e3, 65),
    "eager-true": Cost(400e3, 2000),
    "compiled-true": Cost(500e3, 1500, 60),
    "fused-true": Cost(1500e3, 450),
    "peer": Cost(350e3, 1500),
    "jax-plain": Cost(350e3, 2300, 6),
    "jax-tuned": Cost(800e3, 500, 6),
    "eager-gac": Cost(400e3, 2000),
    "fused-gac": Cost(600e3, 900),
    "eager-ntm": Cost(300e3, 3000),
    "fused-ntm": Cost(400e3, 2000),
    "fused-steered": Cost(100e3, 3000),
}
RULES = ("gac", "ntm", "steered")
"""What a name ends with that computes another rule than the coordinatewise LSTM: one whose coordinates hear
of each other. Measured when asked for."""
FULL = tuple(name for name in COSTS if name != "compiled-true" and not name.endswith(RULES))
LARGE = tuple(name for name in FULL if not name.endswith("-true") and name != "jax-plain")
SWEPT = ("eager", "fused")


def rule_of(backend: str) -> str:
    """Which rule a backend computes: one of :data:`RULES`, or "lstm"."""
    return next((rule for rule in RULES if backend.endswith(f"-{rule}")), "lstm")


class Entrant(NamedTuple):
    """A backend with a number of threads."""

    backend: str
    threads: int

    @property
    def label(self) -> str:
        """For the table."""
        return f"{self.backend}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def is_jax(self) -> bool:
        """Whether JAX is needed."""
        return self.backend.startswith("jax-")

    def bytes(self, workload: str) -> float:
        """Memory of a meta-step, roughly."""
        return COSTS[self.backend].bytes * sizes.coordinate_steps(workload)

    def seconds(self, workload: str) -> float:
        """Of a meta-step, roughly."""
        return sizes.coordinate_steps(workload) / COSTS[self.backend].rate / self.threads

    def start_seconds(self, workload: str) -> float:
        """Until the first meta-step, roughly: what compiles does one or two before."""
        warm_up = {"compiled": 2, "jax": 1}.get(self.backend.partition("-")[0], 0)
        return COSTS[self.backend].start + warm_up * self.seconds(workload)

    def command(self, workload: str, jax_python: str, problem: Path) -> list[str]:
        """What measures it, see :mod:`worker`."""
        here, threads = Path(__file__).parent, ["--threads", str(self.threads)]
        if self.is_jax:
            variant = self.backend.removeprefix("jax-")
            options = ["--problem", str(problem), "--variant", variant]
            return [jax_python, str(here / "jax_peer.py"), *options, *threads]
        options = ["--workload", workload, "--backend", self.backend]
        return [sys.executable, str(here / "torch_worker.py"), *options, *threads]


def has_jax(python: str) -> bool:
    """Whether a Python has JAX."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('jax') is None)"
    try:
        return subprocess.run([python, "-c", code], check=False).returncode == 0
    except OSError:
        return False
