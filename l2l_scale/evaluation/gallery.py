"""Pictures of what optimizers made, where tasks are such that there is something to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from l2l_scale.evaluation.curves import end_points
from l2l_scale.evaluation.entrants import Entrant, Trial
from l2l_scale.evaluation.report import Curves, by_mean
from l2l_scale.evaluation.schema import HeldOutReport
from l2l_scale.evaluation.tables import number
from l2l_scale.optimizers.base import UpdateRule

SHOWN_TASKS = 3
"""How many tasks of each test are shown."""


class Row(NamedTuple):
    """One task: its own pictures, the start, and what optimizers made of it by the horizon."""

    title: str
    pictures: dict[str, np.ndarray]
    """(H, W, 3) by name."""
    losses: dict[str, float]
    """By the names of some of the pictures."""


def gallery(
    test: Trial,
    entrants: Mapping[str, Entrant],
    curves: Mapping[str, Curves],
    report: HeldOutReport,
    horizon: int,
) -> list[Row]:
    """Pictures of a test's first tasks, by the best tuned baseline and the learned rules, which run again.

    Args:
        test: the test.
        entrants: its optimizers.
        curves: their losses.
        report: its statistics.
        horizon: T, the inner step that is shown.

    Returns:
        one row a task; none if the family's tasks have no pictures.
    """
    if not test.held_out.family.has_pictures:
        return []
    held_out, tasks = (
        replace(test.held_out, inner_steps=horizon),
        range(min(SHOWN_TASKS, report["num_tasks"])),
    )
    window = held_out.sampler()(0, tasks)
    chosen = by_mean(report, horizon, ["tuned"])[:1] + by_mean(report, horizon, ["learned"])
    ends = {}
    for name in chosen:
        rule = entrants[name].optimizer
        assert isinstance(rule, UpdateRule), name
        ends[name] = end_points(rule, held_out, tasks).numpy()
    rows = []
    for s in tasks:
        task = {name: leaf[s] for name, leaf in window.task.items()}
        points = {"start": window.theta0[s], **{name: theta[s] for name, theta in ends.items()}}
        losses = {name: float(curves[name].losses[horizon, s]) for name in chosen}
        losses["start"] = float(curves[chosen[0]].losses[0, s])
        pictures = held_out.split_family.pictures(task, points)
        rows.append(Row(f"{test.name}, task {s}", pictures, losses))
    return rows


def draw_gallery(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows one below the other, with the losses, and save the picture as a PNG file."""
    columns = max(len(row.pictures) for row in rows)
    figure = Figure(figsize=(2.1 * columns, 2.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, places in zip(rows, grid, strict=True):
        for ax in places:
            ax.axis("off")
        for ax, (title, picture) in zip(places, _titled(row), strict=False):
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(title, fontsize=8)
    figure.savefig(path, dpi=100)


def _titled(row: Row) -> Iterator[tuple[str, np.ndarray]]:
    """Pictures with their titles: the row's above the first one, and losses below names."""
    above = f"{row.title}\n"
    for name, picture in row.pictures.items():
        loss = f": {number(row.losses[name])}" if np.isfinite(row.losses.get(name, np.nan)) else ""
        yield f"{above}{name}{loss}", picture
        above = "\n"
