"""The picture: mean and median loss curves of all optimizers on one test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l2l_scale.evaluation.report import Curves

LEARNED_COLOURS = ("#d1203f", "#8a1c7c", "#e0701a", "#0b7a75", "#3d348b", "#b8860b")
TUNED_COLOURS = (
    "#1f77b4", "#2a9d6f", "#8c6d31", "#7a68c9", "#17a2b8", "#5b7f2b",
    "#4a5a78", "#b0589c", "#9c9ede", "#6baed6", "#a8a052", "#74c476",
)  # fmt: skip
REFERENCE_COLOURS = ("#222222", "#888888", "#555555")


class Line(NamedTuple):
    """One optimizer in the picture; arrays over the inner steps 0 … T."""

    name: str
    mean: np.ndarray
    error: np.ndarray
    median: np.ndarray
    style: dict[str, Any]


def plot_curves(curves: Mapping[str, Curves], horizon: int, title: str, subtitle: str, path: Path) -> None:
    """Draw mean (with a band of one standard error) and median losses by inner step, and save the picture.

    The mean is over the tasks that are finite at that inner step; the legend counts those that are not.
    Baselines tuned for the sum of losses are left out: the picture shows those tuned for the final loss.

    Args:
        curves: all optimizers.
        horizon: T, marked by a dashed line.
        title: above the picture.
        subtitle: below the title, in small letters; its beginning if it is long.
        path: of the PNG file.
    """
    lines = _lines(curves)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, heading, middle in ((axes[0], "mean ± standard error", True), (axes[1], "median", False)):
        for line in lines:
            _draw(ax, line, middle)
        _decorate(ax, heading, horizon, lines, middle)
    handles, labels = axes[0].get_legend_handles_labels()
    order = sorted(range(len(lines)), key=lambda i: _rank(lines[i], horizon))
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside right upper",
        frameon=False,
        title=f"lowest mean at {horizon} first",
    )
    figure.suptitle(f"{title}\n", fontsize=13, fontweight="bold", x=0.42)
    subtitle = shorten(subtitle, 130, placeholder=" …")
    figure.text(0.42, 0.945, subtitle, fontsize=9, alpha=0.7, ha="center", va="center")
    figure.savefig(path, dpi=140)


def finite_mean(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the finite tasks of each row; NaN where there are none (or one)."""
    finite = np.isfinite(losses)
    count = finite.sum(1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = np.where(finite, losses, 0).sum(1) / count
        squares = np.where(finite, losses - mean[:, None], 0) ** 2
        error = np.sqrt(squares.sum(1) / (count - 1) / count)
    return mean, np.where(count > 1, error, np.nan)


def _lines(curves: Mapping[str, Curves]) -> list[Line]:
    """What is drawn, with its style; learned ones last, so that they lie on top."""
    counts = {"learned": 0, "tuned": 0, "reference": 0}
    lines = []
    for name, entry in curves.items():
        if entry.tuning is not None and entry.tuning["target"] == "sum":
            continue
        losses = entry.losses.double().numpy()  # numpy: many small sums, for which threads only cost
        astray = int((~np.isfinite(losses[-1])).sum())
        label = name + (f" ({astray} not finite)" if astray else "")
        mean, error = finite_mean(losses)
        lines.append(Line(label, mean, error, np.median(losses, 1), _style(entry.kind, counts[entry.kind])))
        counts[entry.kind] += 1
    return sorted(lines, key=lambda line: float(line.style["zorder"]))


def _style(kind: str, i: int) -> dict[str, Any]:
    if kind == "learned":
        return {"color": LEARNED_COLOURS[i % len(LEARNED_COLOURS)], "linewidth": 3.2, "zorder": 4.0}
    if kind == "reference":
        return {"color": REFERENCE_COLOURS[i % 3], "linewidth": 1.6, "linestyle": ":", "zorder": 3.0}
    dashed = i >= len(TUNED_COLOURS)
    colour = TUNED_COLOURS[i % len(TUNED_COLOURS)]
    return {"color": colour, "linewidth": 1.4, "linestyle": "--" if dashed else "-", "zorder": 2.0}


def _draw(ax: Axes, line: Line, middle: bool) -> None:
    """One curve in one panel."""
    values = line.mean if middle else line.median
    steps = np.arange(len(values))
    ax.plot(steps, values, label=line.name, **line.style)
    if middle:
        low = np.maximum(line.mean - line.error, 1e-30) if (line.mean > 0).all() else line.mean - line.error
        ax.fill_between(
            steps, low, line.mean + line.error, color=line.style["color"], alpha=0.15, linewidth=0
        )


def _decorate(ax: Axes, heading: str, horizon: int, lines: list[Line], middle: bool) -> None:
    """Scales, labels and the mark of the horizon."""
    if all(np.nanmin(line.median) > 0 and np.nanmin(line.mean) > 0 for line in lines):
        ax.set_yscale("log")
        ax.set_ylim(*_limits(lines, middle))
    _scale_steps(ax, horizon, max(len(line.mean) for line in lines) - 1)
    ax.axvline(horizon, color="black", linestyle="--", linewidth=1, alpha=0.6)
    at_end = horizon == max(len(line.mean) for line in lines) - 1  # then there is no room on the right
    ax.annotate(
        "horizon of meta-training",
        (horizon, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if at_end else 4, -6),
        textcoords="offset points",
        ha="right" if at_end else "left",
        va="top",
        fontsize=8,
        alpha=0.7,
    )
    ax.set(ylabel="loss", title=heading)
    ax.grid(which="major", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _scale_steps(ax: Axes, horizon: int, last: int) -> None:
    """A root scale where the run is long, so that the steps up to the horizon keep their room."""
    ax.set_xlim(0, last)
    ax.set_xlabel("inner step")
    if last <= 2 * horizon:
        return
    ax.set_xlabel("inner step (root scale)")
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set_xticks(sorted({0, horizon // 5, horizon // 2, horizon, 2 * horizon, 3 * horizon, last}))


def _limits(lines: list[Line], middle: bool) -> tuple[float, float]:
    """Limits that show all but references (which may reach rounding) and explosions."""
    shown = [line for line in lines if line.style["zorder"] != 3.0] or lines
    values = [line.mean if middle else line.median for line in shown]
    low = min((float(value[np.isfinite(value)].min()) for value in values), default=1e-3)
    start = max(float(value[0]) for value in values)
    return low / 2, start * 2 if math.isfinite(start) and start > low else low * 10


def _rank(line: Line, horizon: int) -> float:
    value = float(line.mean[horizon])
    return value if math.isfinite(value) else math.inf
