"""Several rules in one problem: one for each group of parameters.

S slots, N coordinates of a problem, n of them of one group, K inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.optimizers.base import Draw, TwoPhaseRule, UpdateRule
from l2l_scale.tree import Tree


class Grouped(UpdateRule):
    """A rule made of rules, each for its own group of parameters and with its own φ.

    Two LSTMs, one for convolutions, one for the rest, as in Andrychowicz et al. 2016 (section 3.3)::

        Grouped(
            rules={"conv": CoordinatewiseLSTM(), "linear": CoordinatewiseLSTM()},
            groups={"conv": ["conv"], "linear": ["*"]},
        )

    What a rule sees are the coordinates of its group alone: rules whose coordinates hear of each other do so
    within it. A rule whose group a task does not have rests there. Before use the rule is bound to the
    parameters of a task (:meth:`for_spec`); meta-training, evaluation and ``LearnedOptimizer`` do that.

    Args:
        rules: the rules by name; a name is a word.
        groups: for each of them the patterns of its parameters, with ``*``, ``?`` and ``[…]`` as in file
            names. A pattern is compared with the kind of a parameter (conv, linear, norm, bias, embedding,
            other, or what its family calls it) and with its full name ("linear.0.weight"). The first rule
            that has a pattern for a parameter takes it.

    Raises:
        ValueError: if there is no rule, a name is no word, or rules and groups have other names.
    """

    def __init__(self, rules: dict[str, UpdateRule], groups: dict[str, list[str]]) -> None:
        super().__init__()
        if not rules or rules.keys() != groups.keys():
            raise ValueError(
                f"groups ({_names(groups)}) must have a list of patterns for every one of the rules "
                f"({_names(rules)}), and for no others"
            )
        for name, patterns in groups.items():
            if not name.isidentifier() or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"rules ({_names(rules)}) must have names that are words, but {name!r} is none"
                )
            if isinstance(patterns, str) or not patterns:
                raise ValueError(f"groups: {name} ({patterns!r}) must be a list of patterns, as ['conv']")
        self.rules = nn.ModuleDict(rules)
        self.groups = {name: list(patterns) for name, patterns in groups.items()}

    def for_spec(self, spec: FlatSpec) -> BoundGroups:
        """The rules, each bound to its parameters.

        Raises:
            ValueError: if no pattern fits a parameter.
        """
        segments: dict[str, list[Segment]] = {name: [] for name in self.groups}
        for segment in spec.segments:
            segments[self._rule_of(segment)].append(segment)
        given = {name: FlatSpec(tuple(own)) for name, own in segments.items() if own}
        rules = {name: cast("UpdateRule", self.rules[name]).for_spec(own) for name, own in given.items()}
        places = {name: _merged([spec.ranges[s.name] for s in own.segments]) for name, own in given.items()}
        return BoundGroups(rules, places)

    def _rule_of(self, segment: Segment) -> str:
        """The name of the rule that takes a parameter."""
        for name, patterns in self.groups.items():
            if any(fnmatchcase(what, one) for one in patterns for what in (segment.group, segment.name)):
                return name
        raise ValueError(
            f"groups ({self.groups}) must have a pattern for every parameter, but none fits {segment.name!r} "
            f"of kind {segment.group!r}; give the last group the pattern '*', which takes what is left"
        )

    def storage_for(self, size: int) -> str:
        """Not known before the groups are."""
        return ""

    def init_state(self, theta: Tensor) -> Tree:
        """Refused, as the groups are not known."""
        raise ValueError(
            "Grouped must be bound to the parameters of a task first: rule.for_spec(family.spec)"
        )

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Refused, as in :meth:`init_state`."""
        return self.init_state(theta), state


class BoundGroups(UpdateRule):
    """A grouped rule for tasks with certain parameters. Its state is that of each rule, by name.

    Args:
        rules: by name, each for the coordinates of its group.
        places: where these lie on the flat axis, by name, as ranges in rising order; together they cover it.
    """

    def __init__(self, rules: Mapping[str, UpdateRule], places: Mapping[str, Sequence[slice]]) -> None:
        super().__init__()
        self.rules = nn.ModuleDict(rules)
        self.places = {name: tuple(slices) for name, slices in places.items()}

    @property
    def parts(self) -> dict[str, UpdateRule]:
        """The rules by name."""
        return {name: cast("UpdateRule", rule) for name, rule in self.rules.items()}

    def computed_by(self, parts: Mapping[str, UpdateRule]) -> BoundGroups:
        """The same with other ways to compute the rules; in two phases if each of them can do so."""
        two_phases = all(isinstance(rule, TwoPhaseRule) for rule in parts.values())
        return (TwoPhaseGroups if two_phases else BoundGroups)(parts, self.places)

    def init_state(self, theta: Tensor) -> Tree:
        """The states of the rules."""
        return {name: rule.init_state(self.take(name, theta)) for name, rule in self.parts.items()}

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step of every rule on its coordinates."""
        updates, after = {}, {}
        for name, rule in self.parts.items():
            own = self.take(name, grad), self.take(name, theta), state[name]
            updates[name], after[name] = rule(*own)
        return self._put(updates), after

    def open_window(self, theta: Tensor, state: Tree) -> Tree:
        """The states of the rules in their forms for a window."""
        return {
            name: rule.open_window(self.take(name, theta), state[name]) for name, rule in self.parts.items()
        }

    def close_window(self, theta: Tensor, state: Tree) -> Tree:
        """The inverse of :meth:`open_window`."""
        return {
            name: rule.close_window(self.take(name, theta), state[name]) for name, rule in self.parts.items()
        }

    def take(self, name: str, flat: Tensor) -> Tensor:
        """The coordinates of a rule, (*, n) of (*, N)."""
        pieces = [flat[..., place] for place in self.places[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def _put(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`take` for all rules together, (*, N)."""
        pieces: dict[int, Tensor] = {}
        for name, part in parts.items():
            places = self.places[name]
            split = torch.split(part, [place.stop - place.start for place in places], dim=-1)
            pieces |= {place.start: piece for place, piece in zip(places, split, strict=True)}
        return torch.cat([pieces[start] for start in sorted(pieces)], dim=-1)


class TwoPhaseGroups(BoundGroups, TwoPhaseRule):
    """The same where every rule finds the first-order meta-gradient in two phases."""

    def window_losses(
        self, losses: Tensor, grads: Tensor, state: Tree, frozen: Tensor | None, draw: Draw | None = None
    ) -> Tensor:
        """The losses, differentiable in the φ of one rule after another; each draws its own coordinates."""
        for name, rule in self.parts.items():
            own = cast("TwoPhaseRule", rule)
            losses = own.window_losses(losses, self.take(name, grads), state[name], frozen, draw)
        return losses


def _merged(ranges: Sequence[slice]) -> tuple[slice, ...]:
    """The same coordinates in as few ranges as there can be."""
    merged: list[slice] = []
    for place in ranges:
        if merged and merged[-1].stop == place.start:
            merged[-1] = slice(merged[-1].start, place.stop)
        else:
            merged.append(place)
    return tuple(merged)


def _names(things: Mapping[str, object]) -> str:
    return ", ".join(things)
