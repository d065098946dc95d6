"""Everything that is measured of a rule on one family, as pieces of work that do not depend on each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from l2l_scale.diagnosis.imitation import Imitated, imitation
from l2l_scale.diagnosis.meta_gradient import MetaGradient, meta_gradient
from l2l_scale.diagnosis.saturation import Insides
from l2l_scale.diagnosis.sensitivity import Change, Chaos, chaos, sensitivity
from l2l_scale.diagnosis.subject import Subject
from l2l_scale.diagnosis.trajectory import Trajectory, observe
from l2l_scale.evaluation.jobs import Job, Runner


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


class _LeftOut(NamedTuple):
    """Instead of a result."""

    why: str


class _Measurement(NamedTuple):
    """One piece of work."""

    call: Callable[[Subject], Any]
    cost: float
    """Relative to the others, roughly."""
    may_fail: tuple[type[Exception], ...] = ()
    """What it raises where it makes no sense for a rule, an estimator or a task."""
    reason: str = "{}"


_MEASUREMENTS = {
    "trajectory": _Measurement(observe, 2),
    "meta-gradient": _Measurement(meta_gradient, 5, (ValueError,)),
    "imitation": _Measurement(imitation, 1),
    "sensitivity": _Measurement(sensitivity, 5),
    "chaos": _Measurement(chaos, 4, (RuntimeError,), "it does not run in float64: {}"),
}


def examine(subject: Subject) -> Examination:
    """Measure on one family, one thing after another in this process."""
    return examine_all({"": subject}, Runner(num_workers=1))[""]


def examine_all(subjects: Mapping[str, Subject], runner: Runner) -> dict[str, Examination]:
    """Measure on all families. What makes no sense for the rule is left out, with the reason."""
    asked = [(name, what) for name in subjects for what in _MEASUREMENTS]
    jobs = [
        Job(_MEASUREMENTS[what].cost * subjects[name].work, partial(_measure, what, subjects[name]))
        for name, what in asked
    ]
    results = dict(zip(asked, runner.run("looking at the rule", jobs), strict=True))
    return {
        name: _examination(subject, {what: results[name, what] for what in _MEASUREMENTS})
        for name, subject in subjects.items()
    }


def _measure(what: str, subject: Subject) -> Any:
    """One result, or why there is none."""
    call, _, may_fail, reason = _MEASUREMENTS[what]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        try:
            return call(subject)
        except may_fail as error:
            return _LeftOut(reason.format(" ".join(str(error).split())))


def _examination(subject: Subject, results: dict[str, Any]) -> Examination:
    left_out = {what: result.why for what, result in results.items() if isinstance(result, _LeftOut)}
    results |= dict.fromkeys(left_out)
    trajectory, insides = results["trajectory"]
    return Examination(
        str(subject.family),
        trajectory,
        insides,
        results["meta-gradient"],
        results["sensitivity"],
        results["chaos"],
        results["imitation"],
        left_out,
    )
