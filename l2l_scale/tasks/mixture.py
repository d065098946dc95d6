"""Several task families in one run, each with its own slots and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from l2l_scale.checks import check_positive
from l2l_scale.rng import Split
from l2l_scale.tasks.base import TaskFamily


@dataclass(frozen=True, kw_only=True)
class Member:
    """One family of a mixture.

    Args:
        family: the tasks.
        weight: of the mean meta-loss of its slots, relative to the other members'. Losses of different
            families differ in scale: a relative or logarithmic meta-loss makes weights comparable.
        share: of all slots, relative to the other members'; the weight if not given.

    Raises:
        ValueError: if the weight or the share is not a finite number above 0.
    """

    family: TaskFamily
    weight: float = 1.0
    share: float | None = None

    def __post_init__(self) -> None:
        check_positive("weight", self.weight)
        if self.share is not None:
            check_positive("share", self.share)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A rule is trained on several families at once: the meta-loss is the weighted mean of theirs.

    Args:
        members: the families, by name.
        placement: "every_rank", each rank has slots of every family, one family after the other in each
            window; or "rank_groups", each rank has slots of one family only, which keeps large
            optimizees of different shapes apart. It needs as many ranks as members, or more, and the
            slowest group sets the pace: give slow families a larger share of the ranks by a larger share of
            the slots.

    Raises:
        ValueError: if there is no member, or the placement is unknown.
    """

    members: Mapping[str, Member]
    placement: Literal["every_rank", "rank_groups"] = "every_rank"

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("members must name one family at least")
        if self.placement not in ("every_rank", "rank_groups"):
            raise ValueError(f"placement ({self.placement!r}) must be 'every_rank' or 'rank_groups'")

    @classmethod
    def of(cls, family: TaskFamily | Mixture) -> Mixture:
        """A mixture of one family; a mixture as it is."""
        return family if isinstance(family, Mixture) else cls(members={"": Member(family=family)})

    @property
    def families(self) -> dict[str, TaskFamily]:
        """The families by name; one without a mixture is called "" here."""
        return {name: member.family for name, member in self.members.items()}

    @property
    def weights(self) -> dict[str, float]:
        """Of the members' meta-losses; they sum to 1."""
        total = sum(member.weight for member in self.members.values())
        return {name: member.weight / total for name, member in self.members.items()}

    def for_split(self, split: Split) -> Mixture:
        """The same families on the data of a split."""
        return replace(
            self,
            members={
                name: replace(member, family=member.family.for_split(split))
                for name, member in self.members.items()
            },
        )

    def slots(self, total: int) -> dict[str, range]:
        """Deal the global slots 0 … total − 1 out over the members, by their shares; each has one at least.

        Raises:
            ValueError: if there are fewer slots than members.
        """
        counts = divide(total, {name: m.share or m.weight for name, m in self.members.items()}, "slots")
        ranges, start = {}, 0
        for name, count in counts.items():
            ranges[name] = range(start, start + count)
            start += count
        return ranges


def divide(total: int, shares: Mapping[str, float], what: str) -> dict[str, int]:
    """Divide a number of things in proportion to shares, by largest remainders; at least one each.

    Raises:
        ValueError: if there are fewer things than shares.
    """
    if total < len(shares):
        raise ValueError(
            f"{what} ({total}) must be at least the number of families in the mixture ({len(shares)})"
        )
    counts, large, rest = dict.fromkeys(shares, 1), dict(shares), total
    while small := [name for name in large if rest * large[name] < sum(large.values())]:
        for name in small:  # less than one is due to it, and it gets one
            del large[name]
        rest -= len(small)
    exact = {name: rest * share / sum(large.values()) for name, share in large.items()}
    counts |= {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
