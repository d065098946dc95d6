"""Networks of random architecture."""

from __future__ import annotations

import pytest

from l2l_scale.tasks import random_networks


def test_architectures_are_drawn_once_and_differ() -> None:
    mixture = random_networks(12, max_depth=3, min_width=4, max_width=32)
    assert mixture == random_networks(12, max_depth=3, min_width=4, max_width=32)
    families = list(mixture.families.values())
    assert len({family.spec.size for family in families}) == 12
    assert {len(family.hidden) for family in families} == {1, 2, 3}
    assert all(4 <= width <= 32 for family in families for width in family.hidden)
    assert len({family.activation for family in families}) > 2
    assert mixture != random_networks(12, max_depth=3, min_width=4, max_width=32, seed=1)


def test_more_architectures_keep_the_first_ones() -> None:
    assert list(random_networks(5).members.items()) == list(random_networks(8).members.items())[:5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, r"count \(0\)"),
        ({"max_depth": 0}, r"max_depth \(0\)"),
        ({"min_width": 0}, r"min_width \(0\)"),
        ({"min_width": 9, "max_width": 8}, r"min_width \(9\) must be at most max_width \(8\)"),
    ],
)
def test_bad_numbers_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_networks(**settings)
