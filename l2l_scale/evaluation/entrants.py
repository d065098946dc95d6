"""Who runs where: the tests of an evaluation, the optimizers in them, and their loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from l2l_scale.evaluation.baselines import Baseline
from l2l_scale.evaluation.curves import HeldOut, Run, chunked, curves_of_all, join
from l2l_scale.evaluation.jobs import Job, Runner
from l2l_scale.evaluation.references import ReferenceMethod, reference_curves
from l2l_scale.evaluation.report import Curves
from l2l_scale.evaluation.schema import Kind, TuningReport
from l2l_scale.evaluation.settings import HELD_OUT, Evaluation
from l2l_scale.evaluation.tuning import Choice, Tuned, cost, tune
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.rng import Split
from l2l_scale.tasks.base import TaskFamily

REFERENCES = {
    "BFGS": ReferenceMethod.BFGS,
    "L-BFGS": ReferenceMethod.LBFGS,
    "CG": ReferenceMethod.CONJUGATE_GRADIENT,
}
"""Names of the references."""

_RULES_PER_JOB = 4  # they share the drawing of tasks
_LEARNED_COST, _REFERENCE_COST = 16.0, 30.0  # of an inner step, in units of a hand-designed rule's


class Trial(NamedTuple):
    """One distribution of tasks and how optimizers are tested on it."""

    name: str
    held_out: HeldOut
    tuning: HeldOut
    """The tuning tasks; ``inner_steps`` is the horizon."""
    num_reference_tasks: int


class Entrant(NamedTuple):
    """One optimizer in a test."""

    kind: Kind
    optimizer: UpdateRule | ReferenceMethod
    hyper_parameters: dict[str, Any]
    tuning: TuningReport | None = None


TunedByTest = Mapping[str, Mapping[str, Tuned]]


def plan_tests(family: TaskFamily, horizon: int, settings: Evaluation) -> list[Trial]:
    """Return the test on the family itself and those on shifted distributions.

    Raises:
        ValueError: if a run would end before the horizon.
    """
    s = settings
    long = s.inner_steps or 5 * horizon
    short = s.shift_inner_steps or min(2 * horizon, long)
    if min(long, short) < horizon:
        raise ValueError(f"inner_steps ({min(long, short)}) must be at least the horizon ({horizon})")
    base = HeldOut(
        family=family,
        seed=s.test_seed,
        split=Split.TEST,
        num_tasks=s.num_tasks,
        inner_steps=long,
        window=s.window,
        max_coordinates=s.max_coordinates,
        device=s.device,
        backend=s.backend,
    )
    shift = replace(base, num_tasks=s.num_shift_tasks, inner_steps=short)
    tests = [_test(HELD_OUT, base, s.num_tuning_tasks, s.num_reference_tasks, horizon, s.tuning_seed)]
    for name, shifted in (s.shifts or {}).items():
        held_out, few = replace(shift, family=shifted), s.num_reference_tasks // 4
        tests.append(_test(name, held_out, s.num_shift_tuning_tasks, few, horizon, s.tuning_seed))
    return tests


def _test(
    name: str, held_out: HeldOut, num_tuning: int, num_references: int, horizon: int, tuning_seed: int
) -> Trial:
    """One test, with its tuning tasks."""
    tuning = replace(held_out, seed=tuning_seed, split=Split.TUNE, num_tasks=num_tuning, inner_steps=horizon)
    references = 0 if held_out.family.has_data else min(num_references, held_out.num_tasks)
    return Trial(name, held_out, tuning, references)


def tune_all(tests: Sequence[Trial], settings: Evaluation, runner: Runner) -> dict[str, dict[str, Tuned]]:
    """Tune every baseline on every test's own tuning tasks; by test and name."""
    pairs = [(test, baseline) for test in tests for baseline in settings.opponents]
    folder = settings.cache_path
    jobs = [
        Job(cost(baseline, test.tuning), partial(tune, baseline, test.tuning, folder))
        for test, baseline in pairs
    ]
    results: dict[str, dict[str, Tuned]] = {test.name: {} for test in tests}
    for (test, baseline), tuned in zip(pairs, runner.run("tuning baselines", jobs), strict=True):
        results[test.name][baseline.name] = tuned
    return results


def entrants_of(
    test: Trial, learned: Mapping[str, UpdateRule], tuned: TunedByTest, settings: Evaluation
) -> dict[str, Entrant]:
    """Everything that runs in a test, by name: learned rules, tuned baselines, references.

    Raises:
        ValueError: if a learned rule has the name of another optimizer.
    """
    others: dict[str, Entrant] = {}
    for baseline in settings.opponents:
        others |= dict(_tuned_entrants(test, baseline, tuned, settings))
    if test.num_reference_tasks:
        others |= {name: Entrant("reference", m, {"method": m.title}) for name, m in REFERENCES.items()}
    clash = sorted(learned.keys() & others.keys())
    if clash:
        raise ValueError(f"the learned rule {clash[0]!r} has the name of a baseline; give it another one")
    return {name: _learned_entrant(rule, settings.device) for name, rule in learned.items()} | others


def _learned_entrant(rule: UpdateRule, device: str) -> Entrant:
    """A copy of the rule, so that the caller's stays where it is."""
    size = sum(parameter.numel() for parameter in rule.parameters())
    return Entrant("learned", deepcopy(rule).to(device), {"rule": type(rule).__name__, "parameters": size})


def _tuned_entrants(
    test: Trial, baseline: Baseline, tuned: TunedByTest, settings: Evaluation
) -> Iterator[tuple[str, Entrant]]:
    """A baseline as tuned on the family of meta-training; and tuned for the sum, or on the shift."""
    original = tuned[HELD_OUT][baseline.name]
    home = (HELD_OUT, settings.num_tuning_tasks)
    yield baseline.name, _tuned_entrant(test, baseline, original.final, "final", *home)
    if test.name != HELD_OUT:
        here, number = tuned[test.name][baseline.name].final, settings.num_shift_tuning_tasks
        yield (
            f"{baseline.name} (here)",
            _tuned_entrant(test, baseline, here, "final", test.name, number),
        )
    elif original.sum.hyper_parameters != original.final.hyper_parameters:
        yield f"{baseline.name} (sum)", _tuned_entrant(test, baseline, original.sum, "sum", *home)


def _tuned_entrant(
    test: Trial, baseline: Baseline, choice: Choice, target: Any, tuned_on: str, num_tasks: int
) -> Entrant:
    """A baseline with the hyper-parameters that were chosen."""
    rule = baseline.build(choice.hyper_parameters, test.tuning.inner_steps).to(test.held_out.device)
    score = choice.score if math.isfinite(choice.score) else None
    tuning: TuningReport = {
        "target": target,
        "tuned_on": tuned_on,
        "num_tasks": num_tasks,
        "score": score,
        "edges": choice.edges,
    }
    return Entrant("tuned", rule, dict(choice.hyper_parameters), tuning)


def run_all(
    tests: Sequence[Trial], entrants: Sequence[Mapping[str, Entrant]], runner: Runner
) -> list[dict[str, Curves]]:
    """Loss curves of every entrant of every test, by name. All rules run on the same tasks."""
    jobs, owners = [], []
    for i, (test, named) in enumerate(zip(tests, entrants, strict=True)):
        for names, job in _jobs(test, named):
            jobs.append(job)
            owners.append((i, names))
    parts: list[dict[str, list[Run]]] = [{name: [] for name in named} for named in entrants]
    for (i, names), curves in zip(owners, runner.run("running all on held-out tasks", jobs), strict=True):
        for name, run in zip(names, curves, strict=True):
            parts[i][name].append(run)
    return [
        {
            name: Curves(one.kind, one.hyper_parameters, one.tuning, *join(part[name]))
            for name, one in named.items()
        }
        for named, part in zip(entrants, parts, strict=True)
    ]


def _jobs(test: Trial, entrants: Mapping[str, Entrant]) -> Iterator[tuple[list[str], Job]]:
    """Cut the tasks of a test into ranges; one job runs several optimizers on one range, in order."""
    rules = {name: one.optimizer for name, one in entrants.items() if isinstance(one.optimizer, UpdateRule)}
    learned = [name for name in rules if entrants[name].kind == "learned"]
    classic = [name for name in rules if entrants[name].kind == "tuned"]
    groups = [classic[i : i + _RULES_PER_JOB] for i in range(0, len(classic), _RULES_PER_JOB)]
    methods = {n: one.optimizer for n, one in entrants.items() if isinstance(one.optimizer, ReferenceMethod)}
    for names, pieces, price in [(g, 2, 1.0) for g in groups] + [
        ([name], 8, _LEARNED_COST) for name in learned
    ]:
        for tasks in _pieces(test.held_out.num_tasks, pieces):
            call = partial(curves_of_all, [rules[name] for name in names], test.held_out, tasks)
            yield names, _job(price * len(names), test, tasks, call)
    for tasks in _pieces(test.num_reference_tasks, 4) if methods else ():
        call = partial(_reference_curves, list(methods.values()), test.held_out, tasks)
        yield list(methods), _job(_REFERENCE_COST * len(methods), test, tasks, call)


def _job(price: float, test: Trial, tasks: range, call: Callable[[], list[Run]]) -> Job:
    return Job(price * len(tasks) * test.held_out.inner_steps, call)


def _pieces(count: int, pieces: int) -> Iterator[range]:
    """Cut tasks 0 … count − 1 into about so many ranges."""
    return chunked(range(count), -(-count // pieces))


def _reference_curves(methods: Sequence[ReferenceMethod], held_out: HeldOut, tasks: range) -> list[Run]:
    batch = next(held_out.windows(held_out.sampler(), tasks))
    curves = [reference_curves(m, held_out.split_family, batch, held_out.inner_steps) for m in methods]
    return [Run(losses, {}) for losses in curves]
