"""The picture: mean and median loss curves of all optimizers on one test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from l2l_scale.evaluation.report import Curves, median, standard_error

LEARNED_COLOURS = ("#d1203f", "#8a1c7c", "#e0701a")
TUNED_COLOURS = (
    "#1f77b4", "#2a9d6f", "#8c6d31", "#7a68c9", "#17a2b8", "#5b7f2b",
    "#4a5a78", "#b0589c", "#9c9ede", "#6baed6", "#a8a052", "#74c476",
)  # fmt: skip
REFERENCE_COLOURS = ("#222222", "#888888", "#555555")


class Line(NamedTuple):
    """One optimizer in the picture."""

    name: str
    losses: Tensor
    """(inner steps + 1, S), float64"""
    style: dict[str, Any]


def plot_curves(curves: Mapping[str, Curves], horizon: int, title: str, path: Path) -> None:
    """Draw mean (with a band of one standard error) and median losses by inner step, and save the picture.

    The mean is over the tasks that are finite at that inner step; the legend counts those that are not.
    Baselines tuned for the sum of losses are left out: the picture shows those tuned for the final loss.

    Args:
        curves: all optimizers.
        horizon: T, marked by a dashed line.
        title: above the picture.
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
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=140)


def finite_mean(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the finite tasks, (steps,) each; NaN where none is finite."""
    rows = [row[row.isfinite()] for row in losses]
    return torch.stack([row.mean() for row in rows]), torch.stack([standard_error(row) for row in rows])


def _lines(curves: Mapping[str, Curves]) -> list[Line]:
    """What is drawn, with its style; learned ones last, so that they lie on top."""
    counts = {"learned": 0, "tuned": 0, "reference": 0}
    lines = []
    for name, entry in curves.items():
        if entry.tuning is not None and entry.tuning["target"] == "sum":
            continue
        lines.append(Line(name, entry.losses.double(), _style(entry.kind, counts[entry.kind])))
        counts[entry.kind] += 1
    return sorted(lines, key=lambda line: float(line.style["zorder"]))


def _style(kind: str, i: int) -> dict[str, Any]:
    if kind == "learned":
        return {"color": LEARNED_COLOURS[i % 3], "linewidth": 3.2, "zorder": 4.0}
    if kind == "reference":
        return {"color": REFERENCE_COLOURS[i % 3], "linewidth": 1.6, "linestyle": ":", "zorder": 3.0}
    dashed = i >= len(TUNED_COLOURS)
    colour = TUNED_COLOURS[i % len(TUNED_COLOURS)]
    return {"color": colour, "linewidth": 1.4, "linestyle": "--" if dashed else "-", "zorder": 2.0}


def _draw(ax: Axes, line: Line, middle: bool) -> None:
    """One curve in one panel."""
    astray = int((~line.losses[-1].isfinite()).sum())
    label = line.name + (f" ({astray} astray)" if astray else "")
    steps = torch.arange(len(line.losses)).numpy()
    if not middle:
        ax.plot(steps, median(line.losses).numpy(), label=label, **line.style)
        return
    mean, error = finite_mean(line.losses)
    ax.plot(steps, mean.numpy(), label=label, **line.style)
    band = {"color": line.style["color"], "alpha": 0.15, "linewidth": 0}
    ax.fill_between(steps, (mean - error).clamp(min=1e-30).numpy(), (mean + error).numpy(), **band)


def _decorate(ax: Axes, heading: str, horizon: int, lines: list[Line], middle: bool) -> None:
    """Scales, labels and the mark of the horizon."""
    if all((line.losses > 0).all() for line in lines):
        ax.set_yscale("log")
        ax.set_ylim(*_limits(lines, middle))
    ax.set_xlim(0, max(len(line.losses) for line in lines) - 1)
    ax.axvline(horizon, color="black", linestyle="--", linewidth=1, alpha=0.6)
    ax.annotate(
        "horizon of meta-training",
        (horizon, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -6),
        textcoords="offset points",
        va="top",
        fontsize=8,
        alpha=0.7,
    )
    ax.set(xlabel="inner step", ylabel="loss", title=heading)
    ax.grid(which="major", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _limits(lines: list[Line], middle: bool) -> tuple[float, float]:
    """Limits that show all but references (which may reach rounding) and explosions."""
    shown = [line for line in lines if line.style["zorder"] != 3.0] or lines
    values = [finite_mean(line.losses)[0] if middle else median(line.losses) for line in shown]
    stacked = torch.cat([value[value.isfinite() & (value > 0)] for value in values])
    start = max(float(value[0]) for value in values)
    low = float(stacked.min()) if len(stacked) else 1e-3
    return low / 2, start * 2 if math.isfinite(start) and start > low else low * 10


def _rank(line: Line, horizon: int) -> float:
    value = float(finite_mean(line.losses[horizon : horizon + 1])[0])
    return value if math.isfinite(value) else math.inf
