"""The whole diagnosis: look at a rule on every family of its run, and at the run's course."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from l2l_scale.diagnosis.course import Course
from l2l_scale.diagnosis.course_findings import of_course
from l2l_scale.diagnosis.examination import Examination, examine_all
from l2l_scale.diagnosis.finding import Finding
from l2l_scale.diagnosis.findings import (
    of_chaos,
    of_divergence,
    of_meta_gradient,
    of_phi,
    of_sensitivity,
    of_updates,
)
from l2l_scale.diagnosis.imitation_findings import of_imitation
from l2l_scale.diagnosis.insides_findings import of_insides
from l2l_scale.diagnosis.subject import Subject
from l2l_scale.evaluation.jobs import Runner


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


def diagnose(subjects: Mapping[str, Subject], run: Run, runner: Runner | None = None) -> Diagnosis:
    """Measure, and find.

    Args:
        subjects: the rule on each family of the run, by the family's name.
        run: its metrics and settings.
        runner: of the measurements; this process if not given.
    """
    start = time.perf_counter()
    examinations = examine_all(subjects, runner or Runner(num_workers=1))
    first = next(iter(subjects.values()))
    finite = all(bool(value.isfinite().all()) for value in first.rule.parameters())
    findings = list(of_phi(finite))
    for name, one in examinations.items():
        findings += [finding._replace(family=name) for finding in findings_of(one, run.clip)]
    findings += of_course(run.course, run.monitor, run.clip, run.mode)
    order = {"problem": 0, "look": 1, "ok": 2}
    findings.sort(key=lambda finding: order[finding.severity])
    return Diagnosis(findings, examinations, run.course, first, time.perf_counter() - start)


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
