"""Horizons that change over a run: what a slot meets when it walks through it, window by window."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import Regression

from l2l_scale.rng import Split
from l2l_scale.sampling import Curriculum, Phase, RandomHorizons, Schedule, StagedHorizons, WindowSampler

STAGED = StagedHorizons(stages=(6, 15, 9), starts=(0, 5, 17))
RANDOM = RandomHorizons(low=3, high=40, strata=4)
CURRICULA: list[Curriculum] = [STAGED, RANDOM]
SLOTS = (0, 1, 2, 3, 7, 1_000_003)
K = 3


def schedule(curriculum: Curriculum, staggered: bool = True) -> Schedule:
    return Schedule(horizon=30, window=K, staggered=staggered, curriculum=curriculum)


def walk(curriculum: Curriculum, slot: int, count: int, staggered: bool = True, seed: int = 0) -> list[Phase]:
    return [schedule(curriculum, staggered).phase(index, slot, seed) for index in range(count)]


def trajectories(phases: list[Phase]) -> list[list[Phase]]:
    """The walk cut where trajectories start."""
    starts = [index for index, phase in enumerate(phases) if phase.reset]
    return [phases[a:b] for a, b in pairwise([*starts, len(phases)])]


@pytest.mark.parametrize("staggered", [True, False])
@pytest.mark.parametrize("curriculum", CURRICULA, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("slot", SLOTS)
def test_a_slot_walks_through_one_trajectory_after_another(
    curriculum: Curriculum, slot: int, staggered: bool
) -> None:
    phases = walk(curriculum, slot, 60, staggered)
    forced = STAGED.starts if curriculum is STAGED else (0,)
    assert phases[0].reset
    for index, phase in enumerate(phases):
        assert phase.reset == (phase.window == 0 or index in forced)
        assert 0 <= phase.window < phase.horizon // K
        assert phase.horizon in curriculum.horizons(K)
    for trajectory in trajectories(phases):
        first = trajectory[0]
        assert {(phase.generation, phase.horizon) for phase in trajectory} == {first[0::2]}
        assert [phase.window for phase in trajectory] == list(
            range(first.window, first.window + len(trajectory))
        )
    for index, (before, after) in enumerate(pairwise(phases), start=1):
        if after.reset and index not in forced:
            assert before.window == before.horizon // K - 1  # nothing but a stage cuts a trajectory short
        assert (after.generation > before.generation) == after.reset
        assert after.generation >= before.generation


@pytest.mark.parametrize("curriculum", CURRICULA, ids=lambda c: type(c).__name__)
def test_generations_name_one_trajectory_each(curriculum: Curriculum) -> None:
    for slot in SLOTS:
        names = [trajectory[0].generation for trajectory in trajectories(walk(curriculum, slot, 200))]
        assert len(set(names)) == len(names)
        assert names == sorted(names)


@pytest.mark.parametrize("curriculum", [STAGED, RANDOM], ids=lambda c: type(c).__name__)
def test_phases_do_not_depend_on_the_order_in_which_they_are_asked(
    curriculum: StagedHorizons | RandomHorizons,
) -> None:
    cells = [(index, slot) for index in range(40) for slot in range(8)]
    forward = {cell: schedule(curriculum).phase(*cell, 5, Split.VALID) for cell in cells}
    shuffled = [cells[place] for place in np.random.default_rng(0).permutation(len(cells))]
    again = {cell: schedule(replace(curriculum)).phase(*cell, 5, Split.VALID) for cell in shuffled}
    assert again == forward


def test_stages_have_their_horizons_from_their_starts_on() -> None:
    for slot in SLOTS:
        horizons = [phase.horizon for phase in walk(STAGED, slot, 30)]
        assert horizons == [6] * 5 + [15] * 12 + [9] * 13


def test_a_stage_is_like_a_run_that_begins_there() -> None:
    alone = Schedule(horizon=15, window=K)
    for slot in SLOTS:
        later = walk(STAGED, slot, 17)[5:]
        for index, phase in enumerate(later):
            own = alone.phase(index, slot)
            assert phase._replace(generation=0) == own._replace(generation=0)
            assert phase.generation - later[0].generation == own.generation


def test_lockstep_slots_stand_together_in_stages() -> None:
    assert len({tuple(walk(STAGED, slot, 40, staggered=False)) for slot in SLOTS}) == 1


def test_lockstep_slots_start_together_at_random_horizons_but_draw_their_own() -> None:
    walks = [walk(RANDOM, slot, 80, staggered=False) for slot in SLOTS]
    assert {phases[0].window for phases in walks} == {0}
    assert len({tuple(phases) for phases in walks}) > 1
    windows = sum(RANDOM.horizons(K)) // K
    assert all(phases[windows].window == phases[2 * windows].window == 0 for phases in walks)  # whole rounds


def test_staggered_slots_begin_at_different_points_of_a_round() -> None:
    places = {schedule(RANDOM).phase(0, slot)[:3] for slot in range(40)}
    assert len(places) > 10
    assert schedule(RANDOM).phase(0, 0, seed=0) != schedule(RANDOM).phase(0, 0, seed=3)
    splits = {tuple(schedule(RANDOM).phase(i, 0, 0, split) for i in range(50)) for split in Split}
    assert len(splits) == len(Split)


@pytest.mark.parametrize("staggered", [True, False])
def test_every_round_of_a_slot_has_every_stratum_once(staggered: bool) -> None:
    everyone = sorted(RANDOM.horizons(K))
    orders = set()
    for slot in SLOTS:
        horizon_of = {phase.generation: phase.horizon for phase in walk(RANDOM, slot, 300, staggered)}
        for round_ in range(1, 6):  # the first one may be cut
            order = tuple(horizon_of[round_ * 4 + place] for place in range(4))
            assert sorted(order) == everyone
            orders.add(order)
    assert len(orders) > 5


def test_random_horizons_are_log_uniform() -> None:
    curriculum = RandomHorizons(low=100, high=1000, strata=9)
    horizons = curriculum.horizons(1)
    expected = 100 * 10 ** ((np.arange(9) + 0.5) / 9)
    np.testing.assert_array_equal(horizons, np.round(expected))
    met = Counter(phase.horizon for slot in range(3) for phase in first_windows(curriculum, slot))
    assert set(met.values()) == {6}  # two rounds of three slots


def first_windows(curriculum: RandomHorizons, slot: int) -> list[Phase]:
    """The first window of every trajectory of two rounds."""
    windows = sum(curriculum.horizons(1))
    one = Schedule(horizon=1, window=1, staggered=False, curriculum=curriculum)
    phases = [one.phase(index, slot) for index in range(2 * windows)]
    return [phase for phase in phases if phase.window == 0]


def test_horizons_are_whole_windows_and_one_at_least() -> None:
    assert RandomHorizons(low=1, high=5, strata=3).horizons(20) == (20, 20, 20)
    assert all(horizon % 20 == 0 for horizon in RandomHorizons().horizons(20))
    assert RandomHorizons(low=60, high=60, strata=2).horizons(20) == (60, 60)


def test_a_schedule_names_its_horizons_in_rising_order() -> None:
    assert schedule(STAGED).horizons == (6, 9, 15)
    assert Schedule(horizon=30, window=K).horizons == (30,)
    plain = schedule(STAGED).plain()
    assert (plain.horizons, plain.staggered, plain.curriculum) == ((30,), False, None)


@pytest.mark.parametrize(
    ("stages", "starts", "message"),
    [
        ((6, 0), (0, 5), r"stages\[1\] \(0\) must be a whole number >= 1"),
        ((6, 9), (0,), r"starts \(\[0\]\) must have one window for each of the 2 stages"),
        ((), (), r"starts \(\[\]\) must have one window for each of the 0 stages"),
        ((6, 9), (1, 5), r"starts \(\[1, 5\]\) must begin with 0 and rise"),
        ((6, 9, 6), (0, 5, 5), r"starts \(\[0, 5, 5\]\) must begin with 0 and rise"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(
    stages: tuple[int, ...], starts: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StagedHorizons(stages=stages, starts=starts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0}, r"low \(0\) must be a whole number >= 1"),
        ({"high": -1}, r"high \(-1\)"),
        ({"strata": 0}, r"strata \(0\)"),
        ({"low": 200, "high": 100}, r"low \(200\) must be at most high \(100\)"),
    ],
)
def test_bad_random_horizons_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomHorizons(**settings)


def test_a_stage_that_is_not_made_of_whole_windows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"curriculum's horizon \(8\) must be a multiple of window \(3\)"):
        schedule(StagedHorizons(stages=(6, 8), starts=(0, 5)))


def test_stages_from_a_yaml_list_are_hashable_like_tuples() -> None:
    listed = StagedHorizons(stages=[6, 15], starts=[0, 5])  # type: ignore[arg-type]
    assert listed == StagedHorizons(stages=(6, 15), starts=(0, 5))
    assert hash(listed) == hash(StagedHorizons(stages=(6, 15), starts=(0, 5)))


@pytest.mark.parametrize("curriculum", CURRICULA, ids=lambda c: type(c).__name__)
def test_windows_of_a_curriculum_have_the_horizons_and_tasks_of_their_trajectories(
    curriculum: Curriculum,
) -> None:
    plan, slots = schedule(curriculum), range(2, 6)
    sampler = WindowSampler(Regression(), plan, 3, Split.TRAIN)
    windows = [sampler(index, slots) for index in range(40)]
    for index, window in enumerate(windows):
        phases = [plan.phase(index, slot, 3, Split.TRAIN) for slot in slots]
        np.testing.assert_array_equal(window.horizon, [phase.horizon for phase in phases])
        np.testing.assert_array_equal(window.inner_step, [phase.window * K for phase in phases])
        np.testing.assert_array_equal(window.reset, [phase.reset for phase in phases])
    for before, after in pairwise(windows):
        for slot in range(4):
            same = [
                np.array_equal(before.task["x"][slot], after.task["x"][slot]),
                np.array_equal(before.theta0[slot], after.theta0[slot]),
                np.array_equal(before.data["rows"][-1, slot], after.data["rows"][0, slot]),
            ]
            assert same == [not after.reset[slot]] * 3
