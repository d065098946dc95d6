"""What an optimizer keeps of a parameter group, as ``state_dict`` has it, and fitted back to parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2l_scale.deploy.coordinates import flatten, layout_of
from l2l_scale.deploy.guard import POINTS
from l2l_scale.deploy.kinds import bind
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.tree import Tree, tree_leaves


class Window(NamedTuple):
    """The rule's state of a group between two steps."""

    rule: UpdateRule
    theta: Tensor
    state: Tree
    """As the rule's steps work on it (:meth:`UpdateRule.open_window`)."""


def key_of(index: int) -> str:
    """Return where a group's state lies in ``Optimizer.state``.

    A string, because torch casts what lies under a parameter to the parameter's precision when it loads.
    An entry holds plain lists of tensors, so that ``torch.load(weights_only=True)`` reads it.
    """
    return f"group {index}"


def fitted(state: Mapping[Any, Any], groups: Sequence[dict[str, Any]], rule: UpdateRule) -> dict[Any, Any]:
    """A loaded optimizer state, checked, on the devices and in the precision of the groups."""
    by_key = {key_of(index): group for index, group in enumerate(groups)}
    if not state.keys() <= by_key.keys():
        raise ValueError("the state dict was not written by a LearnedOptimizer with these parameter groups")
    with torch.no_grad():
        entries = {key: _fitted_entry(entry, by_key[key], rule) for key, entry in state.items() if entry}
    return defaultdict(dict, entries)


def _fitted_entry(entry: Mapping[str, Any], group: Mapping[str, Any], rule: UpdateRule) -> dict[str, Any]:
    """One group's part of :func:`fitted`."""
    device, dtype = layout_of(group["params"])
    theta = flatten(group["params"], dtype)
    like = tree_leaves(bind(rule, group).init_state(theta))
    shapes, expected = [leaf.shape for leaf in entry["leaves"]], [leaf.shape for leaf in like]
    if entry["rule"] != type(rule).__name__ or shapes != expected:
        raise ValueError(
            f"the state dict is of another rule or of other parameters: it has a {entry['rule']} with "
            f"tensors of shapes {[tuple(s) for s in shapes]}, but a {type(rule).__name__} here needs "
            f"{[tuple(s) for s in expected]}"
        )
    leaves = [leaf.to(device, own.dtype) for leaf, own in zip(entry["leaves"], like, strict=True)]
    result = {"rule": entry["rule"], "leaves": leaves}
    if "guard" in entry:
        result["guard"] = {**entry["guard"], **{n: entry["guard"][n].to(theta) for n in POINTS}}
    return {**result, "theta": entry["theta"].to(theta)} if "theta" in entry else result
