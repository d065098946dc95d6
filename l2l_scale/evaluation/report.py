"""Loss curves as statistics: the content of ``report.json`` (see :mod:`l2l_scale.evaluation.schema`).

T horizon, S tasks. All means are over all tasks, in float64; one task gone astray makes them infinite,
which a reader must see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_scale.evaluation.schema import (
    Comparison,
    HeldOutReport,
    Kind,
    Number,
    OptimizerReport,
    PairedReport,
    Report,
    ScoreReport,
    TuningReport,
    validate,
)
from l2l_scale.tasks.base import TaskFamily
from l2l_scale.unroll import has_diverged

INNER_STEPS = (20, 50, 100, 200)
"""Where losses are reported, besides the horizon and the end of the run."""
LOW_LOSSES = (1e-2, 1e-4, 1e-6)
"""The time to these losses is reported."""
DIVERGED_FACTOR = 10.0
"""A loss diverged if it rose above its start by more than so many times (start + 1)."""


class Curves(NamedTuple):
    """One optimizer's losses on the tasks of a test."""

    kind: Kind
    hyper_parameters: dict[str, Any]
    tuning: TuningReport | None
    losses: Tensor
    """(inner steps + 1, S)"""
    scores: Mapping[str, Tensor] = MappingProxyType({})
    """Figures of merit at the end of the run, (S,) each."""


def reported_steps(horizon: int, inner_steps: int) -> list[int]:
    """At which inner steps losses are reported."""
    return sorted(step for step in {*INNER_STEPS, horizon, inner_steps} if step <= inner_steps)


def summarise(
    family: TaskFamily, num_tuning_tasks: int, horizon: int, curves: Mapping[str, Curves]
) -> HeldOutReport:
    """Statistics of all optimizers on one test."""
    learned = [name for name, entry in curves.items() if entry.kind == "learned"]
    return {
        "family": repr(family),
        "num_tasks": max(entry.losses.shape[1] for entry in curves.values()),
        "num_tuning_tasks": num_tuning_tasks,
        "inner_steps": max(len(entry.losses) for entry in curves.values()) - 1,
        "optimizers": {name: optimizer_report(entry, horizon) for name, entry in curves.items()},
        "paired": {
            mine: {
                other: paired_report(curves[mine].losses, entry.losses, horizon)
                for other, entry in curves.items()
                if other != mine
            }
            for mine in learned
        },
    }


def optimizer_report(entry: Curves, horizon: int) -> OptimizerReport:
    """Statistics of one optimizer."""
    losses = entry.losses.double()
    steps = reported_steps(horizon, len(losses) - 1)
    sums = losses[1 : horizon + 1].sum(0)
    diverged = {str(t): int(is_above(entry.losses[t], entry.losses[0]).sum()) for t in steps}
    spiked = is_above(entry.losses[1:], entry.losses[0]).any(0)
    return {
        "kind": entry.kind,
        "hyper_parameters": entry.hyper_parameters,
        "tuning": entry.tuning,
        "num_tasks": losses.shape[1],
        "mean": {str(t): _number(losses[t].mean()) for t in steps},
        "median": {str(t): _number(median(losses[t])) for t in steps},
        "stderr": {str(t): _number(standard_error(losses[t])) for t in steps},
        "steps_to": {f"{loss:.0e}": _number(median(steps_to(losses, loss))) for loss in LOW_LOSSES},
        "sum_mean": _number(sums.mean()),
        "sum_stderr": _number(standard_error(sums)),
        "num_diverged": diverged[str(steps[-1])],
        "num_diverged_by": diverged,
        "num_spiked": int(spiked.sum()),
        "scores": {name: _score(values.double()) for name, values in entry.scores.items()},
    }


def _score(values: Tensor) -> ScoreReport:
    """Mean and standard error of a figure of merit, (S,)."""
    return {"mean": _number(values.mean()), "stderr": _number(standard_error(values))}


def paired_report(mine: Tensor, other: Tensor, horizon: int) -> PairedReport:
    """A learned optimizer's losses against another's, (inner steps + 1, S) each, on the tasks of both."""
    tasks = min(mine.shape[1], other.shape[1])
    a, b = mine[1 : horizon + 1, :tasks].double(), other[1 : horizon + 1, :tasks].double()
    return {
        "num_tasks": tasks,
        "sum": compare(a.sum(0), b.sum(0)),
        "final": compare(a[-1], b[-1]),
        "steps_to_match": _number(median(steps_to(mine[:, :tasks].double(), b[-1]))),
    }


def compare(a: Tensor, b: Tensor) -> Comparison:
    """Compare one number per task, (S,) each; lower is better."""
    finite = a.isfinite() & b.isfinite()
    difference = (a - b)[finite]
    return {
        "share_lower": (a < b).double().mean().item(),
        "mean_difference": _number(difference.mean()),
        "stderr": _number(standard_error(difference)),
        "num_finite": int(finite.sum()),
    }


def is_above(losses: Tensor, start: Tensor) -> Tensor:
    """Where losses (..., S) are far above their start (S,), or not finite, as curves stay once they are."""
    return has_diverged(losses[None], start, DIVERGED_FACTOR)


def steps_to(losses: Tensor, low: float | Tensor) -> Tensor:
    """The first inner step at which a loss is ``low`` or lower, (S,), infinite where there is none.

    Args:
        losses: (T + 1, S).
        low: one loss, or one for each task, (S,).
    """
    reached = losses <= low
    first = reached.int().argmax(0).double()
    return first.masked_fill(~reached.any(0), math.inf)


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean along the last axis; NaN for a single value."""
    if values.shape[-1] < 2:
        return torch.full(values.shape[:-1], torch.nan, dtype=values.dtype)
    return values.std(-1) / math.sqrt(values.shape[-1])


def median(values: Tensor) -> Tensor:
    """Median along the last axis; the mean of the middle two if their number is even."""
    ordered = values.sort(-1).values
    count = values.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def _number(value: Tensor) -> Number:
    """A finite number, or None."""
    number = value.item()
    return number if math.isfinite(number) else None


def write_json(report: Report, path: Path) -> None:
    """Write a report, after a check of its form."""
    validate(report)
    path.write_text(
        json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def by_mean(test: HeldOutReport, horizon: int, kinds: Sequence[Kind]) -> list[str]:
    """Names of the optimizers of these kinds, the lowest mean loss at the horizon first."""

    def mean(name: str) -> float:
        value = test["optimizers"][name]["mean"][str(horizon)]
        return math.inf if value is None else value

    return sorted((n for n, entry in test["optimizers"].items() if entry["kind"] in kinds), key=mean)
