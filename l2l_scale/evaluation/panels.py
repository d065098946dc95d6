"""The picture of several tests: one panel each, with the learned optimizers and the best tuned baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from l2l_scale.evaluation.plots import LEARNED_COLOURS, TUNED_COLOURS, finite_mean
from l2l_scale.evaluation.report import Curves

COLUMNS = 4
BASELINES = 3
"""So many of the best baselines are drawn in each panel."""


def plot_tests(tests: Mapping[str, Mapping[str, Curves]], horizon: int, path: Path) -> None:
    """Draw mean loss curves with a band of one standard error, a panel for each test, as the paper does.

    Args:
        tests: curves by test and optimizer. Baselines are those that were tuned on the very test, and of them
            the best at the horizon.
        horizon: inner steps that they were tuned for, marked by a line.
        path: of the PNG file.
    """
    columns = min(COLUMNS, len(tests))
    rows = math.ceil(len(tests) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = _colours(tests)
    for ax, (name, curves) in zip(panels, tests.items(), strict=False):
        _draw(ax, name, _shown(name, curves, horizon), horizon, colours)
    for ax in panels[len(tests) :]:
        ax.set_visible(False)
    handles = {
        label: handle for ax in panels for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    ncols = min(6, len(handles))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=ncols, frameon=False
    )
    figure.suptitle(f"mean loss ± standard error; best {BASELINES} baselines tuned on each test", fontsize=11)
    figure.savefig(path, dpi=140)


def _shown(test: str, curves: Mapping[str, Curves], horizon: int) -> dict[str, np.ndarray]:
    """Losses (T + 1, S) of what is drawn in a panel, by the optimizer's name; learned ones first."""
    learned = {name: one.losses.double().numpy() for name, one in curves.items() if one.kind == "learned"}
    here = {
        name.removesuffix(" (here)"): one.losses.double().numpy()
        for name, one in curves.items()
        if one.tuning is not None and one.tuning["tuned_on"] == test and one.tuning["target"] == "final"
    }
    best = sorted(here, key=lambda name: float(here[name][horizon].mean()))[:BASELINES]
    return learned | {name: here[name] for name in best}


def _colours(tests: Mapping[str, Mapping[str, Curves]]) -> dict[str, str]:
    """One colour for an optimizer in all panels."""
    names: dict[str, list[str]] = {"learned": [], "tuned": []}
    for curves in tests.values():
        for name, one in curves.items():
            known = names.get(one.kind, [])
            if (short := name.removesuffix(" (here)")) not in known and not name.endswith(" (sum)"):
                known.append(short)
    palettes = {"learned": LEARNED_COLOURS, "tuned": TUNED_COLOURS}
    return {
        name: palettes[kind][i % len(palettes[kind])]
        for kind, known in names.items()
        for i, name in enumerate(known)
    }


def _draw(
    ax: Axes, title: str, losses: Mapping[str, np.ndarray], horizon: int, colours: Mapping[str, str]
) -> None:
    """One panel."""
    for i, (name, curve) in enumerate(losses.items()):
        mean, error = finite_mean(curve)
        steps = np.arange(len(mean))
        ax.plot(steps, mean, label=name, color=colours[name], linewidth=2.6 if i == 0 else 1.3, zorder=4 - i)
        ax.fill_between(
            steps, np.maximum(mean - error, 1e-30), mean + error, color=colours[name], alpha=0.15, linewidth=0
        )
    if all(np.nanmin(curve) > 0 for curve in losses.values()):
        ax.set_yscale("log")
    ax.axvline(horizon, color="black", linestyle="--", linewidth=1, alpha=0.5)
    ax.set(title=title, xlabel="inner step", xlim=(0, max(len(curve) for curve in losses.values()) - 1))
    ax.title.set_fontsize(10)
    ax.grid(which="major", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
