from __future__ import annotations

import math
from itertools import pairwise

import pytest

from l2l_scale.sampling import Phase, Schedule

STAGGERED = Schedule(horizon=12, window=3)
LOCKSTEP = Schedule(horizon=12, window=3, staggered=False)


def test_lockstep_slots_stand_together_and_reset_every_trajectory() -> None:
    assert LOCKSTEP.windows_per_trajectory == 4
    expected = [Phase(index // 4, index % 4, 12, index % 4 == 0) for index in range(12)]
    for slot in (0, 1, 7):
        assert [LOCKSTEP.phase(index, slot) for index in range(12)] == expected


def test_staggered_slots_stand_at_all_points_of_their_trajectories_at_any_time() -> None:
    for index in range(9):
        windows = [STAGGERED.phase(index, slot).window for slot in range(8)]
        assert sorted(windows) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_few_slots_can_be_spread_over_long_trajectories() -> None:
    spread, next_to_each_other = (
        Schedule(horizon=1000, window=10, staggered=25),
        Schedule(horizon=1000, window=10),
    )
    for index in range(0, 300, 7):
        places = [(index + start) % 100 for start in (0, 25, 50, 75, 0)]
        assert [spread.phase(index, slot).window for slot in range(5)] == places
        windows = [next_to_each_other.phase(index, slot).window for slot in range(5)]
        assert windows == [(index + slot) % 100 for slot in range(5)]
    assert Schedule(horizon=12, window=3, staggered=0).phase(5, 3) == LOCKSTEP.phase(5, 3)
    assert Schedule(horizon=12, window=3, staggered=1).phase(5, 3) == STAGGERED.phase(5, 3)
    with pytest.raises(ValueError, match=r"^staggered \(-1\) must be a whole number >= 0"):
        Schedule(horizon=12, window=3, staggered=-1)


@pytest.mark.parametrize("schedule", [STAGGERED, LOCKSTEP, Schedule(horizon=12, window=3, staggered=2)])
@pytest.mark.parametrize("slot", [0, 1, 3, 4, 1_000_003])
def test_a_slot_walks_through_its_trajectory_and_then_takes_the_next(schedule: Schedule, slot: int) -> None:
    phases = [schedule.phase(index, slot) for index in range(20)]
    assert phases[0].generation == 0
    assert phases[0].reset
    for before, after in pairwise(phases):
        ends = before.window == 3
        assert after.window == (0 if ends else before.window + 1)
        assert after.generation == before.generation + ends
        assert after.reset == ends


def test_phase_is_a_function_of_index_and_slot_alone() -> None:
    cells = [(index, slot) for index in range(10) for slot in range(10)]
    forward = {cell: STAGGERED.phase(*cell) for cell in cells}
    twin = Schedule(horizon=12, window=3)
    assert all(twin.phase(*cell) == forward[cell] for cell in reversed(cells))


def test_one_window_per_trajectory_resets_always() -> None:
    schedule = Schedule(horizon=5, window=5)
    assert [schedule.phase(index, 3) for index in range(3)] == [
        Phase(index, 0, 5, True) for index in range(3)
    ]


@pytest.mark.parametrize(
    ("horizon", "window", "near"), [(100, 30, 25), (100, 18, 20), (7, 3, 1), (10, 20, 10)]
)
def test_a_window_that_does_not_divide_the_horizon_is_refused(horizon: int, window: int, near: int) -> None:
    message = rf"^horizon \({horizon}\) must be a multiple of window \({window}\); .* that fits is {near}$"
    with pytest.raises(ValueError, match=message):
        Schedule(horizon=horizon, window=window)


@pytest.mark.parametrize(
    ("horizon", "window", "message"),
    [
        (0, 1, r"horizon \(0\) must be a whole number >= 1"),
        (-20, 20, r"horizon \(-20\)"),
        (20, 0, r"window \(0\) must be a whole number >= 1"),
        (20, -5, r"window \(-5\)"),
        (math.nan, 5, r"horizon \(nan\)"),
    ],
)
def test_numbers_below_one_are_refused(horizon: int, window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(horizon=horizon, window=window)
