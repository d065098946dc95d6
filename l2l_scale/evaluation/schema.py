"""The form of ``report.json``, version 3, and its check.

Numbers that are infinite or do not exist (a mean over tasks of which one went astray, a standard error of
one task) are null: JSON has no infinity. Statistics by inner step are objects whose keys are inner steps,
as text; inner step t means f(θ_t), the loss after t updates.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypeAlias,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

VERSION = 3

Number: TypeAlias = float | None
"""null where it is infinite or does not exist."""

Kind: TypeAlias = Literal["learned", "tuned", "reference"]


class TuningReport(TypedDict):
    """How the hyper-parameters of a hand-designed optimizer were chosen."""

    target: Literal["final", "sum"]
    """Chosen for the lowest mean of the loss at the horizon, or of the sum of losses up to it."""
    tuned_on: str
    """Name of the test whose family (but not whose tasks) it was tuned on."""
    num_tasks: int
    """Tuning tasks."""
    score: Number
    """Mean of the target over the tuning tasks."""
    edges: list[str]
    """Hyper-parameters whose chosen value is the first or last one of the grid, and not zero."""


class ScoreReport(TypedDict):
    """A figure of merit at the end of the run, over all tasks."""

    mean: Number
    stderr: Number


class OptimizerReport(TypedDict):
    """One optimizer on one test."""

    kind: Kind
    hyper_parameters: dict[str, Any]
    tuning: TuningReport | None
    num_tasks: int
    """Tasks 0 … num_tasks − 1 of the test; references run on fewer."""
    mean: dict[str, Number]
    """Mean loss over all tasks, by inner step."""
    median: dict[str, Number]
    """Median loss over all tasks, by inner step."""
    stderr: dict[str, Number]
    """Standard error of the mean, by inner step."""
    steps_to: dict[str, Number]
    """Median over all tasks of the first inner step at which the loss is as low as this or lower; null where
    half of the tasks never get there. By loss, as text: "1e-06"."""
    sum_mean: Number
    """Mean over tasks of f(θ_1) + … + f(θ_T), T the horizon."""
    sum_stderr: Number
    num_diverged: int
    """Tasks on which it has diverged at the end of the run: the loss was not finite at any inner step, or is
    above its start by more than ten times (start + 1)."""
    num_diverged_by: dict[str, int]
    """The same, by inner step."""
    num_spiked: int
    """Tasks whose loss was so high at any inner step, even if it came down again."""
    scores: dict[str, ScoreReport]
    """Besides the loss, by name: "accuracy" on all images of the test split, for image classifiers."""


class Comparison(TypedDict):
    """One quantity of a learned optimizer (a) and another one (b), task by task."""

    share_lower: float
    """Share of the tasks on which a is strictly lower."""
    mean_difference: Number
    """Mean of a − b over the tasks where both are finite; negative is good for a."""
    stderr: Number
    """Its standard error."""
    num_finite: int
    """Tasks where both are finite."""


class PairedReport(TypedDict):
    """A learned optimizer against another one on the same tasks."""

    num_tasks: int
    sum: Comparison
    """Of f(θ_1) + … + f(θ_T), T the horizon."""
    final: Comparison
    """Of f(θ_T)."""
    steps_to_match: Number
    """Median over tasks of the first inner step at which the learned optimizer's loss is as low as the
    other's f(θ_T) on the same task, or lower; looked for in the whole run, so it may be beyond T. null where
    half of the tasks never get there. With minibatches a lucky one counts."""


class HeldOutReport(TypedDict):
    """All optimizers on the tasks of one family."""

    family: str
    num_tasks: int
    num_tuning_tasks: int
    inner_steps: int
    """Length of the run."""
    optimizers: dict[str, OptimizerReport]
    paired: dict[str, dict[str, PairedReport]]
    """By learned optimizer, then by the one that it is compared with."""


class Report(TypedDict):
    """The whole file."""

    version: int
    horizon: int
    """T, inner steps of the trajectories in meta-training; baselines are tuned for as many."""
    tests: dict[str, HeldOutReport]
    """"held-out" is the family of meta-training; others are shifted distributions."""
    test_seed: int
    tuning_seed: int
    versions: dict[str, str]
    """Of python and the libraries."""
    num_workers: int
    """Processes that the work was spread over."""
    num_threads: int
    """Threads of torch in each of them."""
    wall_seconds: float
    cpu_seconds: float
    """Over all processes; results of tuning that were kept from an earlier run cost nothing."""


def validate(report: object) -> None:
    """Check that ``report`` has the form of :class:`Report`.

    Raises:
        ValueError: naming the place and what is wrong with it.
    """
    _check("report", report, Report)
    version = report["version"]  # type: ignore[index]
    if version != VERSION:
        raise ValueError(f"report.version ({version}) must be {VERSION}")


def _check(place: str, value: Any, form: Any) -> None:
    """Check one value against a type of the classes above."""
    if is_typeddict(form):
        _check_keys(place, value, form)
    elif form is Any:
        return
    elif get_origin(form) is dict:
        _expect(place, value, isinstance(value, dict), form)
        for key, entry in value.items():
            _check(f"{place}.{key}", entry, get_args(form)[1])
    elif get_origin(form) is list:
        _expect(place, value, isinstance(value, list), form)
        for i, entry in enumerate(value):
            _check(f"{place}[{i}]", entry, get_args(form)[0])
    elif get_origin(form) is Literal:
        _expect(place, value, value in get_args(form), form)
    elif get_origin(form) in (UnionType, Union):
        if value is not None:  # the only unions here are with null
            _check(place, value, next(kind for kind in get_args(form) if kind is not NoneType))
    else:
        kinds = (int, float) if form is float else form
        _expect(place, value, isinstance(value, kinds) and not isinstance(value, bool), form)


def _check_keys(place: str, value: Any, form: Any) -> None:
    """Check an object with fixed keys."""
    _expect(place, value, isinstance(value, dict), form)
    forms = get_type_hints(form)
    if value.keys() != forms.keys():
        wrong = sorted(value.keys() ^ forms.keys())
        raise ValueError(f"{place} must have the keys {sorted(forms)}; missing or unknown: {wrong}")
    for key, entry in forms.items():
        _check(f"{place}.{key}", value[key], entry)


def _expect(place: str, value: object, right: bool, form: object) -> None:
    if not right:
        raise ValueError(f"{place} ({value!r}) must be of the form {form}")
