"""The results as a table and as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Speed, Summary
from rich.table import Table


class Result(NamedTuple):
    """What was measured on one workload."""

    description: str
    coordinate_steps: int
    """Of one window."""
    reference: str
    """The method to which ratios refer."""
    speeds: dict[str, list[Speed]]
    drawing_seconds: float
    """CPU seconds to draw one window."""

    def summaries(self, method: str) -> dict[str, Summary]:
        """Speeds, and the ratio by CPU seconds to the reference, repetition by repetition."""
        own, other = self.speeds[method], self.speeds[self.reference]
        ratios = [a.per_cpu_second / b.per_cpu_second for a, b in zip(own, other, strict=True)]
        return {
            "per_second": Summary.of([speed.per_second for speed in own]),
            "per_cpu_second": Summary.of([speed.per_cpu_second for speed in own]),
            "ratio": Summary.of(ratios),
        }


def table(result: Result) -> Table:
    """One row per method; medians, and the range of the ratio."""
    reference = result.speeds[result.reference]
    window_seconds = result.coordinate_steps / Summary.of([s.per_cpu_second for s in reference]).median
    share = result.drawing_seconds / window_seconds
    view = Table(
        title=result.description,
        title_justify="left",
        caption=f"thousands of coordinate-steps; drawing a window, not included: "
        f"{1000 * result.drawing_seconds:.1f} ms, {share:.1%} of the first row's meta-step",
        caption_justify="left",
    )
    view.add_column("method", no_wrap=True)
    for head in ("per CPU s", "per s", "× first", "range"):
        view.add_column(head, justify="right")
    for method in result.speeds:
        cpu, wall, ratio = (
            result.summaries(method)[key] for key in ("per_cpu_second", "per_second", "ratio")
        )
        cells = (f"{cpu.median / 1e3:.0f}", f"{wall.median / 1e3:.0f}", f"{ratio.median:.2f}")
        view.add_row(method, *cells, f"{ratio.low:.2f} – {ratio.high:.2f}")
    return view


def write(path: Path, threads: int, results: dict[str, Result]) -> None:
    """Write everything as JSON; every number as median, low, high."""
    document: dict[str, Any] = {
        "unit": "coordinate-steps per second",
        "torch": torch.__version__,
        "machine": platform.platform(),
        "threads": threads,
        "workloads": {name: _plain(result) for name, result in results.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def _plain(result: Result) -> dict[str, Any]:
    return {
        "description": result.description,
        "coordinate_steps": result.coordinate_steps,
        "reference": result.reference,
        "drawing_seconds": result.drawing_seconds,
        "methods": {
            method: {key: value._asdict() for key, value in result.summaries(method).items()}
            for method in result.speeds
        },
    }
