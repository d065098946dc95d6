"""Kinds of parameters, for rules that treat convolutions, linear layers, ... each in their own way.

A parameter group of a torch optimizer may say what its parameters are called ("param_names", torch's own) and
of what kind they are ("kinds"); what it does not say is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.grouped import Grouped

KINDS = "kinds"
"""The key of a parameter group below which the kinds of its parameters lie, in their order."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of a model that require gradients, with names and kinds, for ``LearnedOptimizer``.

    A grouped rule then takes exactly the groups that it would in meta-training on this model::

        optimizer = LearnedOptimizer(parameter_groups(model), "rule.safetensors")

    All lie in one group of the optimizer, as the coordinates of one problem.
    """
    kinds = {segment.name: segment.group for segment in FlatSpec.of_module(model).segments}
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [{"params": named, KINDS: [kinds[name] for name, _ in named]}]


def bind(rule: UpdateRule, group: Mapping[str, Any]) -> UpdateRule:
    """A rule for the parameters of a group of the optimizer; only grouped ones ask for them.

    Raises:
        ValueError: if a grouped rule has no pattern for a parameter.
    """
    return rule.for_spec(spec_of(group)) if is_grouped(rule) else rule


def is_grouped(rule: UpdateRule) -> bool:
    """Whether a rule, or one inside it, tells groups of parameters apart."""
    return any(isinstance(module, Grouped) for module in rule.modules())


def spec_of(group: Mapping[str, Any]) -> FlatSpec:
    """Names, shapes and kinds of a group's parameters; parameters without a name are called 0, 1, …

    Raises:
        ValueError: if the group does not have as many kinds as parameters.
    """
    params: Sequence[Tensor] = group["params"]
    known: Sequence[str] = group.get("param_names", ())
    names = known or [str(number) for number in range(len(params))]
    kinds: Sequence[str] = group.get(KINDS) or guess_kinds(params, known)
    if len(kinds) != len(params):
        raise ValueError(
            f"{KINDS} ({list(kinds)}) must be as many as the {len(params)} parameters of the group"
        )
    described = zip(names, params, kinds, strict=True)
    return FlatSpec(tuple(Segment(name, tuple(param.shape), kind) for name, param, kind in described))


def guess_kinds(params: Sequence[Tensor], names: Sequence[str]) -> list[str]:
    """Guess kinds by numbers of dimensions: three or more conv, two linear, fewer bias.

    Where there are names, norm layers are found by theirs: a weight of one dimension, and the bias beside it.
    """
    kinds = ["conv" if param.dim() > 2 else "linear" if param.dim() == 2 else "bias" for param in params]
    owners = [name.rpartition(".") for name in names]
    flat = zip(owners, kinds, strict=False)
    norms = {owner for (owner, _, last), kind in flat if last == "weight" and kind == "bias"}
    for number, (owner, _, _) in enumerate(owners):
        if owner in norms and kinds[number] == "bias":
            kinds[number] = "norm"
    return kinds
