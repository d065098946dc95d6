"""The layout in which kernels hold a rule's state: blocks of coordinates, a row per number.

The packed state is (B, R, BLOCK) for M coordinates of all problems, one after the other, in B = ⌈M / BLOCK⌉
blocks. Its R rows are the leaves of the rule's state in order: a leaf (*, N) or (*, 1) is one row, a leaf
(*, N, H) is H rows. Neighbouring numbers are the same quantity of neighbouring coordinates, as vector units
and memory like it. Conversion costs two copies per window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_scale.tree import Tree, tree_leaves, tree_map, tree_unflatten

BLOCK = 32


def pack(state: Tree, shape: torch.Size, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """Pack the state of problems of shape (*, N); differentiable.

    Args:
        state: leaves (*, N), (*, 1) or (*, N, H).
        shape: of θ, (*, N).
        rows: R, all leaves' rows.
        dtype: of the result; that of the state if not given.
    """
    leaves = tree_leaves(state)
    total = shape.numel()
    blocks = -(-total // BLOCK)
    packed: Tensor = leaves[0].new_empty(blocks, rows, BLOCK, dtype=dtype)
    packed[-1:] = 0  # lanes beyond the last coordinate
    row = 0
    for leaf in leaves:
        columns = leaf if leaf.dim() > len(shape) else leaf.expand(shape).unsqueeze(-1)
        size = columns.shape[-1]
        columns = columns.reshape(total, size)
        full = total // BLOCK
        packed[:full, row : row + size] = columns[: full * BLOCK].view(full, BLOCK, size).transpose(1, 2)
        if full < blocks:
            packed[full, row : row + size, : total - full * BLOCK] = columns[full * BLOCK :].T
        row += size
    assert row == rows, (row, rows)
    return packed


@dataclass(frozen=True)
class Outline:
    """What is needed of a leaf to unpack it."""

    shape: torch.Size
    dtype: torch.dtype


def outlines(state: Tree) -> Tree:
    """A state without its content; its leaves are :class:`Outline`."""
    return tree_map(lambda leaf: Outline(leaf.shape, leaf.dtype), state)


def unpack(packed: Tensor, like: Tree, shape: torch.Size) -> Tree:
    """The inverse of :func:`pack`, with the structure and leaf shapes of ``like``; differentiable.

    Args:
        packed: the packed state.
        like: the state that was packed, or its :func:`outlines`.
        shape: of θ, (*, N).
    """
    total, row, leaves = shape.numel(), 0, []
    for leaf in tree_leaves(like):
        many = len(leaf.shape) > len(shape)
        size = leaf.shape[-1] if many else 1
        columns = packed[:, row : row + size].transpose(1, 2).reshape(-1, size)[:total].to(leaf.dtype)
        own = columns.view(leaf.shape if many else shape)[..., : leaf.shape[-1]]
        if own.untyped_storage().nbytes() > 2 * own.numel() * own.element_size():
            own = own.clone(memory_format=torch.contiguous_format)  # or files would hold all of it
        leaves.append(own)
        row += size
    return tree_unflatten(leaves, like)
