"""How a run went, from its ``metrics.csv``."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np


class Series(NamedTuple):
    """One metric over meta-steps; what was not finite is left out."""

    steps: np.ndarray
    values: np.ndarray


Course: TypeAlias = dict[str, Series]
"""Series by the metric's name."""


def read_course(folder: Path) -> Course:
    """Read the metrics of a run; of one that was resumed, those of all its starts. Empty if it has none.

    Where a resumed run went over some meta-steps again, the later numbers count.

    Raises:
        ValueError: if a file is damaged.
    """
    rows: list[tuple[int, dict[str, str]]] = []
    for path in _files(folder):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                new = [(int(row["step"]), row) for row in csv.DictReader(file)]
        except (csv.Error, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); move it away to go on without it") from error
        first = min((step for step, _ in new), default=math.inf)
        rows = [row for row in rows if row[0] < first] + new
    found: dict[str, list[tuple[int, float]]] = {}
    for step, row in rows:
        for name, text in row.items():
            if name != "step" and text and math.isfinite(value := float(text)):
                found.setdefault(name, []).append((step, value))
    return {name: Series(*map(np.array, zip(*pairs, strict=True))) for name, pairs in found.items()}


def _files(folder: Path) -> list[Path]:
    """metrics-1.csv, metrics-2.csv, … and metrics.csv: the order in which they were written."""
    earlier = {
        int(found[1]): path
        for path in folder.glob("metrics-*.csv")
        if (found := re.fullmatch(r"metrics-(\d+)\.csv", path.name))
    }
    last = folder / "metrics.csv"
    return [earlier[number] for number in sorted(earlier)] + ([last] if last.exists() else [])


def flat_since(series: Series, slack: float) -> int | None:
    """The meta-step from which on the best value gained no more than ``slack`` of its whole gain.

    None where it never got better than at its start.
    """
    best = np.minimum.accumulate(series.values)
    gain = best[0] - best[-1]
    if gain <= 0:
        return None
    return int(series.steps[np.argmax(best <= best[-1] + slack * gain)])
