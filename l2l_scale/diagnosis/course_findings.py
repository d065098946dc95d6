"""Findings about how a run went, from its metrics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from l2l_scale.diagnosis.course import Course, Series, flat_since
from l2l_scale.diagnosis.finding import Finding, graded
from l2l_scale.diagnosis.thresholds import (
    CLIPPED_LOOK,
    ENOUGH_VALIDATIONS,
    FLAT_SHARE,
    FLAT_SLACK,
    SKIPPED_LOOK,
    SKIPPED_PROBLEM,
    TRAIN_DIVERGED_LOOK,
    TRAIN_DIVERGED_PROBLEM,
)

_STEADY = "another model.learning_rate, a longer horizon or more units may help; or it is as good as it gets"


def of_course(
    course: Course, monitor: str | None, clip: float | None, mode: str = "min"
) -> Iterator[Finding]:
    """Progress, skipped meta-steps, diverged slots, and clipping.

    Args:
        course: may be empty.
        monitor: the metric that chooses the best φ; None if none does.
        clip: the norm that gradients of φ are cut to; None where they are not.
        mode: "min" or "max", what is best.
    """
    if not course:
        yield Finding("ok", "course", "the run has no metrics.csv; nothing is known of how it went")
        return
    if monitor is not None:
        yield from _of_progress(course, monitor, mode)
    yield from _of_skipped(course)
    yield from _of_diverged(course)
    yield from _of_clipping(course, clip)


def _of_progress(course: Course, monitor: str, mode: str) -> Iterator[Finding]:
    series = course.get(monitor)
    if series is None or len(series.steps) < ENOUGH_VALIDATIONS:
        count = 0 if series is None else len(series.steps)
        yield Finding("ok", "course", f"{monitor}: {count} validations, too few to judge the course by")
        return
    sign = -1 if mode == "max" else 1
    last, since = int(series.steps[-1]), flat_since(Series(series.steps, sign * series.values), FLAT_SLACK)
    best = sign * (sign * series.values).min()
    span = f"{monitor} {series.values[0]:.4g} at first, best {best:.4g}"
    if since is None:
        advice = f"nothing was learned: look at the findings above and below; {_STEADY}"
        yield Finding("problem", "course", f"{span}: never better", advice)
    elif last - since > FLAT_SHARE * last:
        yield Finding("look", "course", f"{span}: flat since meta-step {since:,} of {last:,}", _STEADY)
    else:
        yield Finding("ok", "course", f"{span}, gained until meta-step {since:,} of {last:,}")


def _of_skipped(course: Course) -> Iterator[Finding]:
    series = course.get("train/num_skipped")
    if series is None:
        return
    # The count starts anew where a run is resumed.
    skipped = float(np.diff(series.values, prepend=0).clip(min=0).sum())
    share = skipped / max(float(series.steps[-1]), 1.0)
    severity = graded(share, SKIPPED_LOOK, SKIPPED_PROBLEM)
    if severity != "ok":
        text = f"{skipped:.0f} meta-steps ({share:.1%}) were skipped: their gradient was not finite"
        advice = "shorter data.window; smaller first updates; second_order off; LogLoss needs losses >= 0"
        yield Finding(severity, "skipped", text, advice)


def _of_diverged(course: Course) -> Iterator[Finding]:
    for name, series in course.items():
        if not name.startswith("train/diverged"):
            continue
        share = float(_last_quarter(series.steps, series.values).mean())
        severity = graded(share, TRAIN_DIVERGED_LOOK, TRAIN_DIVERGED_PROBLEM)
        if severity != "ok":
            text = f"{share:.1%} of the slots diverged per window in the last quarter of the training"
            family = name.removeprefix("train/diverged").removeprefix("/")
            advice = "lower the head's scale or model.learning_rate; shorter horizons first (StagedHorizons)"
            yield Finding(severity, "training", text, advice, family)


def _of_clipping(course: Course, clip: float | None) -> Iterator[Finding]:
    series = course.get("train/grad_norm")
    if series is None:
        return
    norms = _last_quarter(series.steps, series.values)
    middle, largest = float(np.median(norms)), float(norms.max())
    text = f"norm of φ's gradient in the last quarter: median {middle:.2g}, largest {largest:.2g}"
    if clip is None:
        yield Finding("ok", "clipping", f"{text}; not clipped")
        return
    text += f"; clipped to {clip:g}"
    if float((norms > 10 * clip).mean()) > CLIPPED_LOOK:
        advice = (
            "nearly all gradients are cut to a tenth or less, so Adam sees directions only: "
            "a higher trainer.gradient_clip_val, or NormalizedLoss, if tasks differ in scale"
        )
        yield Finding("look", "clipping", text, advice)
    else:
        yield Finding("ok", "clipping", text)


def _last_quarter(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    kept: np.ndarray = values[steps >= 0.75 * steps[-1]]
    return kept
