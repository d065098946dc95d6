"""Nested containers of tensors ("trees"): rule states, task constants, minibatches.

A tree is a tensor (or array) or a tuple, list, NamedTuple or dict of trees. This file is the only one
that touches ``torch.utils._pytree``, which torch keeps semi-private.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree

Tree: TypeAlias = Any
"""A tensor, or a tuple / list / NamedTuple / dict of trees (Any: torch has no recursive type for it)."""


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Apply ``function`` leaf by leaf to trees of one structure."""
    return _pytree.tree_map(function, tree, *others)


def tree_leaves(tree: Tree) -> list[Any]:
    """Return the leaves in a fixed order (dicts by insertion)."""
    return _pytree.tree_leaves(tree)


def tree_unflatten(leaves: list[Any], like: Tree) -> Tree:
    """Return a tree with the structure of ``like`` and these leaves."""
    return _pytree.tree_unflatten(leaves, _pytree.tree_structure(like))


def tree_detach(tree: Tree) -> Tree:
    """Cut every leaf out of its autograd graph."""
    return tree_map(lambda leaf: leaf.detach(), tree)


def tree_where(mask: Tensor, on_true: Tree, on_false: Tree) -> Tree:
    """Choose leaf by leaf along the slot axis; ``mask`` has shape (S,), leaves (S, ...)."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)

    return tree_map(choose, on_true, on_false)
