from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import Regression

from l2l_scale.rng import Split
from l2l_scale.tasks import ImageClassifier, Member, Mixture, Quadratic
from l2l_scale.tasks.mixture import divide

FAMILY = Quadratic(dimension=2)
OTHER = Regression()


def mixture(**members: Member) -> Mixture:
    return Mixture(members=members)


def random_shares(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {str(number): float(share) for number, share in enumerate(rng.lognormal(size=rng.integers(1, 9)))}


@pytest.mark.parametrize("seed", range(20))
def test_divide_gives_all_away_in_proportion_and_at_least_one_each(seed: int) -> None:
    shares = random_shares(seed)
    for total in (len(shares), len(shares) + 1, 40, 1000):
        counts = divide(total, shares, "slots")
        exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
        assert list(counts) == list(shares)
        assert sum(counts.values()) == total
        assert min(counts.values()) >= 1
        if min(exact.values()) >= 1:
            assert all(abs(counts[name] - exact[name]) < 1 for name in shares)


def test_shares_that_come_out_even_are_met() -> None:
    shares = {"a": 8.0, "b": 4.0, "c": 4.0, "d": 1.0, "e": 1.0}
    assert divide(72, shares, "slots") == {"a": 32, "b": 16, "c": 16, "d": 4, "e": 4}


def test_what_is_due_less_than_one_gets_one_at_the_expense_of_the_others() -> None:
    assert divide(10, {"a": 1e-9, "b": 6.0, "c": 3.0}, "slots") == {"a": 1, "b": 6, "c": 3}
    assert divide(6, {"a": 100.0, "b": 1.0, "c": 1.0}, "slots") == {"a": 4, "b": 1, "c": 1}


@pytest.mark.parametrize("seed", range(20))
def test_who_has_a_larger_share_never_gets_less_and_scale_does_not_matter(seed: int) -> None:
    shares = random_shares(seed)
    counts = divide(50, shares, "slots")
    ranked = sorted(shares, key=shares.__getitem__)
    assert [counts[name] for name in ranked] == sorted(counts.values())
    assert divide(50, {name: 4 * share for name, share in shares.items()}, "slots") == counts


def test_equal_shares_are_dealt_out_evenly_with_the_rest_to_the_first() -> None:
    assert divide(8, dict.fromkeys("abc", 0.1), "slots") == {"a": 3, "b": 3, "c": 2}


def test_fewer_things_than_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks \(2\) must be at least the number of families .* \(3\)"):
        divide(2, dict.fromkeys("abc", 1.0), "ranks")


def test_slots_follow_shares_and_shares_default_to_weights() -> None:
    own = mixture(a=Member(family=FAMILY, weight=3.0), b=Member(family=OTHER, weight=1.0))
    assert own.slots(10) == {"a": range(0, 8), "b": range(8, 10)}
    shared = mixture(a=Member(family=FAMILY, weight=3.0, share=1.0), b=Member(family=OTHER, share=4.0))
    assert shared.slots(12) == {"a": range(0, 2), "b": range(2, 12)}
    assert shared.weights == {"a": 0.75, "b": 0.25}


def test_a_family_alone_is_a_mixture_of_one_with_all_slots_and_the_whole_weight() -> None:
    alone = Mixture.of(FAMILY)
    assert (alone.families, alone.weights, alone.slots(5)) == ({"": FAMILY}, {"": 1.0}, {"": range(5)})
    assert Mixture.of(alone) is alone


def test_every_member_goes_to_the_split_and_all_else_stays() -> None:
    images = ImageClassifier(hidden=(2,))
    before = Mixture(
        members={"a": Member(family=images, weight=2.0, share=3.0), "b": Member(family=FAMILY)},
        placement="rank_groups",
    )
    after = before.for_split(Split.VALID)
    assert after.families == {"a": images.for_split(Split.VALID), "b": FAMILY.for_split(Split.VALID)}
    assert after.families["a"] != images
    assert (after.weights, after.slots(9), after.placement) == (
        before.weights,
        before.slots(9),
        "rank_groups",
    )


@pytest.mark.parametrize("name", ["weight", "share"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_weights_and_shares_must_be_positive_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be a finite number > 0"):
        Member(family=FAMILY, **{name: value})


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="members must name one family at least"):
        mixture()


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match=r"placement \('ranks'\) must be 'every_rank' or 'rank_groups'"):
        Mixture(members={"a": Member(family=FAMILY)}, placement="ranks")  # type: ignore[arg-type]
