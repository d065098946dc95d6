"""Who works on what: every slot has one seat, and seats change nothing about what is drawn in a slot."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from conftest import Regression

from l2l_scale.rng import Split
from l2l_scale.sampling import RankSampler, Schedule, Seat, WindowSampler, join, seats_of, to_batch
from l2l_scale.tasks import Member, Mixture, Quadratic
from l2l_scale.tree import tree_leaves
from l2l_scale.unroll import WindowBatch

Placement = Literal["every_rank", "rank_groups"]
SCHEDULE = Schedule(horizon=12, window=3)
FAMILIES = {"valley": Quadratic(dimension=4), "rows": Regression(), "plain": Quadratic(dimension=2)}
WEIGHTS = {"valley": 3.0, "rows": 1.0, "plain": 0.5}
SHARES = {"valley": 1.0, "rows": 2.0, "plain": 1.0}


def mixture(placement: Placement = "every_rank") -> Mixture:
    members = {
        name: Member(family=family, weight=WEIGHTS[name], share=SHARES[name])
        for name, family in FAMILIES.items()
    }
    return Mixture(members=members, placement=placement)


CASES: list[tuple[Placement, int, int]] = [
    ("every_rank", 15, 1),  # 4, 7, 4 slots
    ("every_rank", 11, 1),
    ("every_rank", 3, 1),
    ("every_rank", 36, 3),
    ("every_rank", 32, 2),
    ("rank_groups", 15, 3),  # one rank each
    ("rank_groups", 32, 4),
    ("rank_groups", 24, 5),
]


def everyone(placement: Placement, slots: int, ranks: int) -> list[tuple[Seat, ...]]:
    return [seats_of(mixture(placement), slots, rank, ranks) for rank in range(ranks)]


def draws(seats: tuple[Seat, ...]) -> RankSampler:
    samplers = tuple(WindowSampler(FAMILIES[seat.member], SCHEDULE, 3, Split.TRAIN) for seat in seats)
    return RankSampler(samplers, tuple(seat.slots for seat in seats))


def assert_same(ours: WindowBatch, theirs: WindowBatch) -> None:
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(("placement", "slots", "ranks"), CASES)
def test_every_slot_has_exactly_one_seat(placement: Placement, slots: int, ranks: int) -> None:
    seats = everyone(placement, slots, ranks)
    for name, own in mixture().slots(slots).items():
        taken = [slot for rank in seats for seat in rank if seat.member == name for slot in seat.slots]
        assert taken == list(own)  # in order of the ranks, as checkpoints are put together
    assert sorted(slot for rank in seats for seat in rank for slot in seat.slots) == list(range(slots))
    assert all(len(rank) == (1 if placement == "rank_groups" else 3) for rank in seats)


@pytest.mark.parametrize(("placement", "slots", "ranks"), CASES)
def test_mean_over_ranks_is_the_weighted_mean_over_families(
    placement: Placement, slots: int, ranks: int
) -> None:
    value = np.random.default_rng(0).standard_normal(slots)  # of each slot's meta-loss
    of_ranks = [
        sum(seat.weight * value[list(seat.slots)].mean() for seat in rank)
        for rank in everyone(placement, slots, ranks)
    ]
    expected = sum(
        WEIGHTS[name] / 4.5 * value[list(own)].mean() for name, own in mixture().slots(slots).items()
    )
    assert abs(np.mean(of_ranks) - expected) <= 1e-14


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_one_after_the_other_draw_what_one_rank_draws(ranks: int) -> None:
    whole = seats_of(mixture(), 16, 0, 1)
    parts = everyone("every_rank", 16, ranks)
    for index in (0, 1, 5):
        expected = to_batch(whole, draws(whole)(index))
        drawn = [draws(seats)(index) for seats in parts]
        for place, seat in enumerate(expected):
            assert_same(join([piece for rank in drawn for piece in rank[place]]), seat.window)
            assert {seats[place].member for seats in parts} == {seat.member}


def test_groups_of_ranks_draw_what_one_rank_draws() -> None:
    whole = seats_of(mixture(), 24, 0, 1)
    for index in (0, 4):
        expected = {member: window for member, _, window in to_batch(whole, draws(whole)(index))}
        drawn: dict[str, list] = {name: [] for name in FAMILIES}  # type: ignore[type-arg]
        for seats in everyone("rank_groups", 24, 5):
            drawn[seats[0].member] += draws(seats)(index)[0]
        for name, pieces in drawn.items():
            assert_same(join(pieces), expected[name])


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 12])
def test_parts_joined_are_the_whole(parts: int) -> None:
    seats = seats_of(mixture(), 15, 0, 1)
    whole = draws(seats)
    shares = [whole.part(number, parts) for number in range(parts)]
    for place, seat in enumerate(seats):
        assert [slot for share in shares for slot in share.slots[place]] == list(seat.slots)
        assert max(len(share.slots[place]) for share in shares) <= -(-len(seat.slots) // parts)
    for index in (0, 3):
        drawn = [share(index) for share in shares]
        pieces = [[piece for share in drawn for piece in share[place]] for place in range(len(seats))]
        for ours, theirs in zip(to_batch(seats, pieces), to_batch(seats, whole(index)), strict=True):
            assert ours[:2] == theirs[:2]
            assert_same(ours.window, theirs.window)


def test_the_largest_seat_is_known() -> None:
    assert draws(seats_of(mixture(), 15, 0, 1)).max_slots == 7


@pytest.mark.parametrize(("slots", "ranks", "fits"), [(10, 4, 8), (3, 4, 4), (15, 2, 16)])
def test_slots_of_one_family_that_do_not_divide_are_refused(slots: int, ranks: int, fits: int) -> None:
    message = (
        rf"^slots \({slots}\) must be a multiple of the ranks that share them \({ranks}\).* {fits} would do"
    )
    with pytest.raises(ValueError, match=message):
        seats_of(Mixture.of(FAMILIES["rows"]), slots, 0, ranks)


def test_slots_of_a_member_that_do_not_divide_are_refused_by_its_name() -> None:
    with pytest.raises(
        ValueError, match=r"slots of rows \(7\) must be a multiple .* \(2\).* 8 of rows would do"
    ):
        seats_of(mixture(), 15, 0, 2)


@pytest.mark.parametrize("rank", range(4))
def test_groups_whose_slots_do_not_divide_are_refused_on_every_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=r"slots of rows \(7\) must be a multiple .* \(2\)"):
        seats_of(mixture("rank_groups"), 15, rank, 4)


def test_fewer_slots_than_members_are_refused() -> None:
    with pytest.raises(ValueError, match=r"slots \(2\) must be at least the number of families .* \(3\)"):
        seats_of(mixture(), 2, 0, 1)


def test_fewer_ranks_than_members_are_refused_for_groups() -> None:
    with pytest.raises(ValueError, match=r"number of ranks \(2\) must be at least the number of families"):
        seats_of(mixture("rank_groups"), 32, 0, 2)
