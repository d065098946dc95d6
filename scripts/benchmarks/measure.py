"""Timing: interleaved repetitions, so that a busy machine disturbs all methods alike."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Speed(NamedTuple):
    """Coordinate-steps done in one repetition."""

    per_second: float
    per_cpu_second: float


class Summary(NamedTuple):
    """Median, minimum and maximum over the repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def once(step: Callable[[], object], work: int, min_seconds: float) -> Speed:
    """Repeat ``step`` for at least ``min_seconds``; each call does ``work`` coordinate-steps."""
    gc.collect()
    calls, wall_start, cpu_start = 0, time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - wall_start < min_seconds:
        step()
        calls += 1
    wall, cpu = time.perf_counter() - wall_start, time.process_time() - cpu_start
    return Speed(calls * work / wall, calls * work / cpu)


def interleaved(
    steps: Mapping[str, Callable[[], object]], work: int, repetitions: int, min_seconds: float
) -> dict[str, list[Speed]]:
    """Every method in turn, ``repetitions`` times. Call each once before: first calls are slower."""
    results: dict[str, list[Speed]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            results[name].append(once(step, work, min_seconds))
    return results


def subprocess_peer(command: list[str]) -> list[Speed]:
    """Speeds that a peer in a process of its own prints; it compiles first, so it cannot be interleaved.

    Raises:
        SystemExit: with the peer's own words, if it fails.
    """
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"error: the peer failed: {' '.join(command)}\n{run.stderr[-2000:]}")
    records = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return [
        Speed(record["coordinate_steps_per_s"], record.get("per_cpu_s", record["coordinate_steps_per_s"]))
        for record in records
        if "coordinate_steps_per_s" in record
    ]
