"""An external memory that the coordinates of a problem share: M ← decay · M + Σ_w a_w b_wᵀ, read as M r.

Andrychowicz et al. 2016, appendix B (NTM-BFGS). One interface, two storages: the matrix itself, or a window
of the vectors that were written (NTM-L-BFGS). Both are exact, until the window is cut.
Shapes: ``*`` independent problems, N coordinates of one, W vectors per write, R per read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.tree import Tree

Storage: TypeAlias = Literal["auto", "dense", "window"]
"""How a memory is stored; "auto" is dense for problems of few coordinates, else a window."""


class Memory(ABC):
    """A storage. It holds settings only; what was written is in the tree that its methods pass on."""

    @abstractmethod
    def init(self, theta: Tensor) -> Tree:
        """The memory before the first write, a multiple of the identity, for ``theta`` (*, N)."""

    @abstractmethod
    def read(self, memory: Tree, r: Tensor) -> Tensor:
        """M r for every column of ``r`` (*, N, R); the same shape."""

    @abstractmethod
    def write(self, memory: Tree, a: Tensor, b: Tensor, decay: Tensor | float = 1.0) -> Tree:
        """decay · M + a bᵀ: the columns of ``a`` and ``b`` (*, N, W) are the vectors of W outer products.

        Args:
            memory: M.
            a: left vectors.
            b: right vectors.
            decay: what is left of M, a number or (*, 1).
        """


class DenseMemory(Memory):
    """M itself, (*, N, N): a read costs N² · R, and so much memory is taken.

    Args:
        initial: M_0 = initial · I.
    """

    def __init__(self, initial: float = 0.0) -> None:
        self.initial = initial

    def init(self, theta: Tensor) -> Tree:
        """initial · I, (*, N, N)."""
        size = theta.shape[-1]
        identity = torch.eye(size, dtype=theta.dtype, device=theta.device)
        return (self.initial * identity).expand(*theta.shape, size)

    def read(self, memory: Tree, r: Tensor) -> Tensor:
        """M r."""
        result: Tensor = memory @ r
        return result

    def write(self, memory: Tree, a: Tensor, b: Tensor, decay: Tensor | float = 1.0) -> Tree:
        """decay · M + a bᵀ."""
        factor = decay.unsqueeze(-1) if isinstance(decay, Tensor) else decay
        return factor * memory + a @ b.mT


class Window(NamedTuple):
    """The vectors of the last writes, the oldest first."""

    scale: Tensor
    """(*, 1): what is left of M_0, as a multiple of the identity."""
    left: Tensor
    """(*, N, V), zero where nothing was written yet."""
    right: Tensor
    """(*, N, V)"""
    strength: Tensor
    """(*, V): what decay has left of every outer product."""


class WindowedMemory(Memory):
    """M = scale · I + Σ_v strength_v a_v b_vᵀ over the last writes: N · V numbers, a read costs N · V · R.

    Exact as long as no more has been written than the window holds; then the oldest write is forgotten.

    Args:
        initial: M_0 = initial · I.
        writes: how many writes the window holds.
        heads: W, the vectors of one write.
    """

    def __init__(self, initial: float, writes: int, heads: int) -> None:
        self.initial, self.vectors = initial, writes * heads

    def init(self, theta: Tensor) -> Window:
        """An empty window."""
        zeros = theta.new_zeros(*theta.shape, self.vectors)
        scale = torch.full_like(theta[..., :1], self.initial)
        return Window(scale, zeros, zeros, theta.new_zeros(*theta.shape[:-1], self.vectors))

    def read(self, memory: Tree, r: Tensor) -> Tensor:
        """Scale · r + Σ_v strength_v a_v (b_vᵀ r); no N × N matrix is made."""
        products = memory.strength.unsqueeze(-1) * (memory.right.mT @ r)
        result: Tensor = memory.scale.unsqueeze(-1) * r + memory.left @ products
        return result

    def write(self, memory: Tree, a: Tensor, b: Tensor, decay: Tensor | float = 1.0) -> Window:
        """Append a write, and drop the oldest one."""
        heads = a.shape[-1]
        kept = decay * memory.strength[..., heads:]
        return Window(
            decay * memory.scale,
            torch.cat((memory.left[..., heads:], a), dim=-1),
            torch.cat((memory.right[..., heads:], b), dim=-1),
            torch.cat((kept, torch.ones_like(a[..., 0, :])), dim=-1),
        )


def is_dense(storage: Storage, size: int, max_dense: int) -> bool:
    """Whether the memory of a problem of ``size`` coordinates is stored as a matrix."""
    return storage == "dense" or (storage == "auto" and size <= max_dense)


def check_storage(storage: str, window: int, max_dense: int) -> None:
    """Raise ``ValueError`` unless there is such a storage, and its sizes are whole numbers of at least 1."""
    check_count("window", window)
    check_count("max_dense", max_dense)
    if storage not in ("auto", "dense", "window"):
        raise ValueError(f"storage ({storage!r}) must be 'auto', 'dense' or 'window'")
