"""The whole evaluation: tune the baselines, run everything on held-out tasks, write report and picture."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import Progress

from l2l_scale.cores import one_thread
from l2l_scale.evaluation.entrants import Trial, entrants_of, plan_tests, run_all, tune_all
from l2l_scale.evaluation.jobs import Runner, progress_display
from l2l_scale.evaluation.panels import plot_tests
from l2l_scale.evaluation.plots import plot_curves
from l2l_scale.evaluation.report import Curves, summarise, write_json
from l2l_scale.evaluation.schema import VERSION, Report
from l2l_scale.evaluation.settings import HELD_OUT, Evaluation
from l2l_scale.evaluation.tables import (
    losses_table,
    markdown,
    print_table,
    shifts_table,
    tuned_table,
    verdict,
)
from l2l_scale.evaluation.tuning import Choice, Tuned
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.tasks.base import TaskFamily


def evaluate(
    learned: Mapping[str, UpdateRule],
    family: TaskFamily,
    horizon: int,
    settings: Evaluation,
    out: Path | None = None,
    silent: bool = False,
) -> Report:
    """Compare learned rules with tuned baselines on tasks that none of them saw.

    Args:
        learned: rules by name; the first is the one that tables compare with.
        family: of meta-training.
        horizon: T of meta-training; baselines are tuned for as many inner steps.
        settings: how to compare.
        out: folder for ``report.json``, ``report.md`` and ``curves.png``; None writes nothing.
        silent: neither progress nor tables.

    Returns:
        The content of ``report.json``; see :mod:`l2l_scale.evaluation.schema`.

    Raises:
        ValueError: if the run would end before the horizon, or a learned rule has a baseline's name.
    """
    start = time.perf_counter()
    tests = plan_tests(family, horizon, settings)
    with one_thread(), _display(silent) as display:
        runner = Runner(settings.workers, display)
        tuned = tune_all(tests, settings, runner)
        entrants = [entrants_of(test, learned, tuned, settings) for test in tests]
        results = run_all(tests, entrants, runner)
        report = _report(tests, results, horizon, settings, runner, time.perf_counter() - start)
        if out is not None:
            _write(report, results, out)
    if not silent:
        _print(report)
    return report


def tune_baselines(
    family: TaskFamily, horizon: int, settings: Evaluation, out: Path | None = None, silent: bool = False
) -> dict[str, Tuned]:
    """Tune the baselines for a family and a horizon; returns them by name.

    Args:
        family: of meta-training; shifted distributions are not looked at.
        horizon: T, inner steps that are tuned for.
        settings: as for :func:`evaluate`.
        out: folder for ``tuning.json``; None writes nothing.
        silent: neither progress nor table.
    """
    tests = plan_tests(family, horizon, replace(settings, shifts=None))
    with _display(silent) as display:
        tuned = tune_all(tests, settings, Runner(settings.workers, display))[HELD_OUT]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = {name: {"final": _json(t.final), "sum": _json(t.sum)} for name, t in tuned.items()}
        (out / "tuning.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if not silent:
        note = f"scores are means over {settings.num_tuning_tasks} tuning tasks, {horizon} inner steps"
        print_table("Tuned baselines", tuned_table(tuned), note)
    return tuned


def _json(choice: Choice) -> dict[str, Any]:
    """As JSON, which has no infinity: an infinite score is null."""
    return choice._asdict() | {"score": choice.score if math.isfinite(choice.score) else None}


def _display(silent: bool) -> AbstractContextManager[Progress | None]:
    return nullcontext() if silent else progress_display()


def _report(
    tests: list[Trial],
    results: list[dict[str, Curves]],
    horizon: int,
    settings: Evaluation,
    runner: Runner,
    wall_seconds: float,
) -> Report:
    """Statistics, settings and surroundings."""
    libraries = ("l2l_scale", "torch", "numpy", "scipy")
    return {
        "version": VERSION,
        "horizon": horizon,
        "tests": {
            test.name: summarise(test.held_out.family, test.tuning.num_tasks, horizon, curves)
            for test, curves in zip(tests, results, strict=True)
        },
        "test_seed": settings.test_seed,
        "tuning_seed": settings.tuning_seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "num_workers": runner.num_workers,
        "num_threads": 1,
        "wall_seconds": wall_seconds,
        "cpu_seconds": runner.cpu_seconds,
    }


def _write(report: Report, results: list[dict[str, Curves]], out: Path) -> None:
    """Write report.json, report.md and the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(report, out / "report.json")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    test = report["tests"][HELD_OUT]
    title = f"{test['num_tasks']} held-out tasks"
    plot_curves(results[0], report["horizon"], title, test["family"], out / "curves.png")
    if len(results) > 1:
        named = dict(zip(report["tests"], results, strict=True))
        plot_tests(named, report["horizon"], out / "tests.png")


def _print(report: Report) -> None:
    """Print the table of the held-out test and one line per shifted distribution."""
    horizon, test = report["horizon"], report["tests"][HELD_OUT]
    title = f"Loss on {test['num_tasks']} held-out tasks"
    print_table(title, losses_table(test, horizon, every_step=False), verdict(test, horizon))
    shifts = shifts_table(report)
    if shifts is not None:
        print_table(f"Mean loss at inner step {horizon} on shifted distributions", shifts)
