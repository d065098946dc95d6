"""One task's named parameters as one flat axis of N coordinates, and back.

Gradients, parameters and rule states are held as (S, N, ...): one block beats one call per tensor.
Every coordinate belongs to a named *group* (conv, linear, bias, ...), so that a rule can treat
kinds of parameters differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Segment(NamedTuple):
    """One named parameter: its shape and the group that it belongs to."""

    name: str
    shape: tuple[int, ...]
    group: str

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FlatSpec:
    """Names, shapes and groups of one task's parameters, in the order in which they lie on the flat axis."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        names = [segment.name for segment in self.segments]
        if not names:
            raise ValueError("a task needs at least one parameter, but its FlatSpec has none")
        if len(set(names)) < len(names):
            raise ValueError(f"parameter names must be unique, got {names}")

    @cached_property
    def size(self) -> int:
        """N, the number of coordinates."""
        return sum(segment.size for segment in self.segments)

    @cached_property
    def ranges(self) -> dict[str, slice]:
        """Where each named parameter lies on the flat axis."""
        ranges, start = {}, 0
        for segment in self.segments:
            ranges[segment.name] = slice(start, start + segment.size)
            start += segment.size
        return ranges

    @cached_property
    def groups(self) -> dict[str, tuple[slice, ...]]:
        """Where each group lies on the flat axis, as ranges in rising order."""
        groups: dict[str, tuple[slice, ...]] = {}
        for segment in self.segments:
            groups[segment.group] = (*groups.get(segment.group, ()), self.ranges[segment.name])
        return groups

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of ``flat`` (*, N) as named parameters (*, *shape)."""
        parts = torch.split(flat, [segment.size for segment in self.segments], dim=-1)
        return {
            segment.name: part.reshape((*flat.shape[:-1], *segment.shape))
            for segment, part in zip(self.segments, parts, strict=True)
        }

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Named parameters (*, *shape) as one tensor (*, N); the inverse of :meth:`unflatten`."""
        parts = []
        for segment in self.segments:
            param = params[segment.name]
            leading = param.shape[: param.dim() - len(segment.shape)]
            assert param.shape[len(leading) :] == segment.shape, (segment, param.shape)
            parts.append(param.reshape(*leading, segment.size))
        return torch.cat(parts, dim=-1)

    @classmethod
    def single(cls, name: str, size: int) -> FlatSpec:
        """The spec of a task with one vector of parameters."""
        return cls((Segment(name, (size,), name),))

    @classmethod
    def of_module(cls, module: nn.Module) -> FlatSpec:
        """The spec of a module's parameters, tied ones once, grouped by kind (:func:`parameter_kind`)."""
        segments, known = [], dict(module.named_parameters())
        for path, owner in module.named_modules():
            for name, param in owner.named_parameters(recurse=False):
                full = f"{path}.{name}" if path else name
                if full in known:
                    segments.append(Segment(full, tuple(param.shape), parameter_kind(owner, name, param)))
        return cls(tuple(segments))


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def parameter_kind(owner: nn.Module, name: str, param: Tensor) -> str:
    """Name the group of a module's parameter: conv, linear, embedding, norm, bias or other."""
    if isinstance(owner, _NORMS):
        return "norm"
    if param.dim() < 2:
        return "bias"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    return "linear" if param.dim() == 2 else "other"
