"""Tuning as hard as anyone would: a search in two stages on a lattice without ends.

Learning rates lie on a logarithmic lattice; where the best one is on the edge of what was tried, more is
tried. Other hyper-parameters have fixed sets of values. The first stage tries all their combinations at
few rates on a part of the tuning tasks; the second tries the most promising ones on the fine lattice on all
tasks, and only its scores decide. A score is a mean over tasks; one task gone astray makes it infinite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from l2l_scale.evaluation.baselines import Baseline
from l2l_scale.evaluation.cache import remember
from l2l_scale.evaluation.curves import HeldOut, Point, sweep
from l2l_scale.rng import Split

KEEP = 3
"""So many combinations of the other hyper-parameters reach the second stage, for each target."""
COARSE_SHARE, COARSE_MIN, COARSE_MAX = 8, 4, 128
"""The first stage sees one in so many tuning tasks, but at least and at most so many."""
LIMITS = (-12, 6)
"""Where even this search ends, in decades: rates 1e-12 and 1e6."""

Cell: TypeAlias = "tuple[int, int]"
"""A point of the grid: number of the combination, number of the rate on the lattice."""

Scores: TypeAlias = "dict[Cell, tuple[float, float]]"
"""Mean final loss and mean sum of losses of the cells tried."""

TARGETS = (0, 1)
"""What is tuned for: index of the final loss and of the sum in a cell's scores."""


class Choice(NamedTuple):
    """The best point that was found."""

    hyper_parameters: dict[str, float]
    score: float
    """Mean over the tuning tasks of the final loss, or of the sum of losses; infinite if even the best point
    let a task go astray."""
    edges: list[str]
    """Hyper-parameters whose best value is the first or last of all that were tried, and not zero: nothing
    lies beyond zero."""


class Tuned(NamedTuple):
    """What tuning one baseline gave."""

    final: Choice
    """Best mean of f(θ_T), T the horizon."""
    sum: Choice
    """Best mean of f(θ_1) + … + f(θ_T)."""
    num_points: int
    """How many points were tried on all tasks."""


def tune(baseline: Baseline, held_out: HeldOut, cache: Path | None = None) -> Tuned:
    """Tune a baseline for the inner steps of ``held_out``, or recall what tuning it gave before.

    Args:
        baseline: what is tuned.
        held_out: the tuning tasks; ``inner_steps`` is the horizon tuned for.
        cache: folder that keeps results; None keeps nothing. Only the package's own families are kept.
    """
    assert held_out.split == Split.TUNE, held_out.split
    others, lattice = dict(baseline.others), baseline.rates_per_decade
    grid = {"name": baseline.name, "rates": baseline.rates, "others": others, "rates_per_decade": lattice}
    settings = {"tune": grid, "held_out": held_out}
    return _from_json(remember(cache, settings, lambda: _to_json(_search(baseline, held_out))))


def point(baseline: Baseline, cell: Cell) -> Point:
    """Hyper-parameters of a cell."""
    return {"learning_rate": 10 ** (cell[1] / baseline.rates_per_decade), **baseline.combinations[cell[0]]}


def cost(baseline: Baseline, held_out: HeldOut) -> float:
    """About how many inner steps tuning takes, over all tasks and points; for progress bars only."""
    combinations, decades = len(baseline.combinations), math.log10(baseline.rates[1] / baseline.rates[0])
    wide, middle = _strides(baseline)
    coarse = combinations * decades * baseline.rates_per_decade / wide * _few(held_out.num_tasks)
    fine = min(combinations, KEEP + 1) * (2 * wide / middle + 4) * held_out.num_tasks
    return (coarse + fine) * held_out.inner_steps


def _search(baseline: Baseline, held_out: HeldOut) -> Tuned:
    """Both stages. What the first one found counts in the second one too if it saw all tasks."""
    few = _few(held_out.num_tasks)
    coarse = _first_stage(baseline, replace(held_out, num_tasks=few))
    fine = _second_stage(baseline, held_out, coarse, coarse if few == held_out.num_tasks else {})
    final, total = (_choice(baseline, fine, target) for target in TARGETS)
    return Tuned(final, total, len(fine))


def _strides(baseline: Baseline) -> tuple[int, int]:
    """Every how many rates of the lattice the first stage and the start of the second try."""
    wide = baseline.rates_per_decade // 2
    return wide, max(1, wide // 4)


def _few(num_tasks: int) -> int:
    """How many tasks the first stage sees."""
    return min(num_tasks, max(COARSE_MIN, num_tasks // COARSE_SHARE), COARSE_MAX)


def _first_stage(baseline: Baseline, held_out: HeldOut) -> Scores:
    """All combinations at few rates, until no combination's best rate is an end."""
    low, high = (round(math.log10(rate) * baseline.rates_per_decade) for rate in baseline.rates)
    combinations, (stride, _) = range(len(baseline.combinations)), _strides(baseline)
    wanted = {(c, rate) for c in combinations for rate in range(low, high + stride, stride)}
    scores: Scores = {}
    while wanted:
        scores |= _score(baseline, held_out, wanted)
        bests = {_best(_of(scores, c), target) for c in combinations for target in TARGETS}
        wanted = _around(baseline, bests, stride) - scores.keys()
    return scores


def _second_stage(baseline: Baseline, held_out: HeldOut, coarse: Scores, known: Scores) -> Scores:
    """The most promising combinations on ever finer rates, until neither target's best rate is an end."""
    promising = {cell for target in TARGETS for cell in _promising(coarse, target)}
    wide, middle = _strides(baseline)
    steps = range(-wide, wide + 1, middle)
    scores = dict(known)
    wanted = _inside(baseline, ((c, rate + step) for c, rate in promising for step in steps)) - scores.keys()
    for distance in (middle, 1):
        while wanted:
            scores |= _score(baseline, held_out, wanted)
            wanted = _around(baseline, _bests(scores), distance) - scores.keys()
        wanted = _around(baseline, _bests(scores), 1) - scores.keys()
    return scores


def _score(baseline: Baseline, held_out: HeldOut, cells: Iterable[Cell]) -> Scores:
    """Run all tasks with the hyper-parameters of all cells."""
    ordered = sorted(cells)
    points = [point(baseline, cell) for cell in ordered]
    results = sweep(lambda hypers: baseline.build(hypers, held_out.inner_steps), points, held_out)
    finals, sums = results.mean(2).tolist()
    return dict(zip(ordered, zip(finals, sums, strict=True), strict=True))


def _around(baseline: Baseline, cells: Iterable[Cell], distance: int) -> set[Cell]:
    """The cells with the next lower and higher rates, as far as the lattice goes."""
    return _inside(baseline, ((c, rate + step) for c, rate in cells for step in (-distance, distance)))


def _inside(baseline: Baseline, cells: Iterable[Cell]) -> set[Cell]:
    """Those cells that lie on the lattice."""
    low, high = _ends(baseline)
    return {cell for cell in cells if low <= cell[1] <= high}


def _ends(baseline: Baseline) -> tuple[int, int]:
    """The first and the last rate of the lattice."""
    return LIMITS[0] * baseline.rates_per_decade, LIMITS[1] * baseline.rates_per_decade


def _of(scores: Scores, combination: int) -> Scores:
    """The scores of one combination."""
    return {cell: score for cell, score in scores.items() if cell[0] == combination}


def _best(scores: Scores, target: int) -> Cell:
    """The best cell; among equals the one with the lowest rate (all infinite: lower rates are tried next)."""
    return min(scores, key=lambda cell: (scores[cell][target], cell[1], cell[0]))


def _bests(scores: Scores) -> set[Cell]:
    """The best cell for each target."""
    return {_best(scores, target) for target in TARGETS}


def _promising(scores: Scores, target: int) -> list[Cell]:
    """The best cells of the ``KEEP`` best combinations."""
    bests = [_best(_of(scores, c), target) for c in {cell[0] for cell in scores}]
    return sorted(bests, key=lambda cell: scores[cell][target])[:KEEP]


def _choice(baseline: Baseline, scores: Scores, target: int) -> Choice:
    """The best cell as hyper-parameters, with what lies on an edge."""
    best = _best(scores, target)
    chosen = dict(point(baseline, best))
    others = baseline.others.items()
    edges = [name for name, values in others if chosen[name] and chosen[name] in (values[0], values[-1])]
    if best[1] in _ends(baseline):
        edges.insert(0, "learning_rate")
    return Choice(chosen, scores[best][target], edges)


def _to_json(tuned: Tuned) -> dict[str, Any]:
    """As JSON; the floats survive exactly, and an infinite score is written as Infinity."""
    return {"final": tuned.final._asdict(), "sum": tuned.sum._asdict(), "num_points": tuned.num_points}


def _from_json(kept: dict[str, Any]) -> Tuned:
    """The inverse of :func:`_to_json`."""
    return Tuned(Choice(**kept["final"]), Choice(**kept["sum"]), kept["num_points"])
