"""The whole diagnosis: look at a rule on every family of its run, and at the run's course."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from l2l_scale.cores import one_thread
from l2l_scale.diagnosis.course import Course
from l2l_scale.diagnosis.course_findings import of_course
from l2l_scale.diagnosis.finding import Finding
from l2l_scale.diagnosis.findings import (
    of_chaos,
    of_divergence,
    of_meta_gradient,
    of_phi,
    of_sensitivity,
    of_updates,
)
from l2l_scale.diagnosis.imitation import Imitated, imitation
from l2l_scale.diagnosis.imitation_findings import of_imitation
from l2l_scale.diagnosis.insides_findings import of_insides
from l2l_scale.diagnosis.meta_gradient import MetaGradient, meta_gradient
from l2l_scale.diagnosis.saturation import Insides
from l2l_scale.diagnosis.sensitivity import Change, Chaos, chaos, sensitivity
from l2l_scale.diagnosis.subject import Subject
from l2l_scale.diagnosis.trajectory import Trajectory, observe


class Examination(NamedTuple):
    """What was measured on one family."""

    family: str
    """What it prints as."""
    trajectory: Trajectory
    insides: Insides
    meta_gradient: MetaGradient | None
    changes: list[Change]
    chaos: Chaos | None
    imitated: Imitated | None
    """None too where the run does not imitate."""
    left_out: dict[str, str]
    """What could not be measured, and why."""


class Diagnosis(NamedTuple):
    """Everything that is reported."""

    findings: list[Finding]
    """The worst first."""
    examinations: dict[str, Examination]
    """By the family's name in the mixture; "" without one."""
    course: Course
    subject: Subject
    """The first."""
    seconds: float


class Run(NamedTuple):
    """What the run says besides its rule."""

    course: Course
    """Its metrics; empty if there are none."""
    monitor: str | None = "valid/sum"
    mode: str = "min"
    clip: float | None = None
    """The norm that gradients of φ are cut to."""


def diagnose(subjects: Mapping[str, Subject], run: Run) -> Diagnosis:
    """Measure, and find.

    Args:
        subjects: the rule on each family of the run, by the family's name.
        run: its metrics and settings.
    """
    start = time.perf_counter()
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        examinations = {name: examine(subject) for name, subject in subjects.items()}
    first = next(iter(subjects.values()))
    finite = all(bool(value.isfinite().all()) for value in first.rule.parameters())
    findings = list(of_phi(finite))
    for name, one in examinations.items():
        findings += [finding._replace(family=name) for finding in findings_of(one, run.clip)]
    findings += of_course(run.course, run.monitor, run.clip, run.mode)
    order = {"problem": 0, "look": 1, "ok": 2}
    findings.sort(key=lambda finding: order[finding.severity])
    return Diagnosis(findings, examinations, run.course, first, time.perf_counter() - start)


def examine(subject: Subject) -> Examination:
    """Measure on one family. What makes no sense for the rule is left out, with the reason."""
    left_out: dict[str, str] = {}
    trajectory, insides = observe(subject)
    gradient, nudged, imitated = None, None, None
    try:
        gradient = meta_gradient(subject)
        imitated = imitation(subject)
    except ValueError as error:  # the estimator does not fit this rule or this horizon
        left_out["meta-gradient"] = str(error)
    changes = sensitivity(subject)
    try:
        nudged = chaos(subject)
    except RuntimeError as error:  # a rule or a task of one's own that does not compute in double precision
        left_out["chaos"] = f"it does not run in float64: {' '.join(str(error).split())}"
    return Examination(
        str(subject.family), trajectory, insides, gradient, changes, nudged, imitated, left_out
    )


def findings_of(one: Examination, clip: float | None) -> Iterator[Finding]:
    """All findings about one family."""
    yield from of_updates(one.trajectory)
    yield from of_divergence(one.trajectory)
    yield from of_insides(one.insides)
    if one.meta_gradient is not None:
        yield from of_meta_gradient(one.meta_gradient, clip)
    if one.imitated is not None:
        yield from of_imitation(one.imitated, one.trajectory.losses)
    yield from of_sensitivity(one.changes)
    if one.chaos is not None:
        yield from of_chaos(one.chaos)
    for what, why in one.left_out.items():
        yield Finding("ok", what, f"not measured: {why}")
