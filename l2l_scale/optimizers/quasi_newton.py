"""A memory that writes what BFGS writes: from pairs of a step s and the change y of the gradient along it.

BFGS approximates the inverse Hessian by M⁺ = V M Vᵀ + ρ s sᵀ, with V = I − ρ s yᵀ and ρ = 1 / sᵀy (Nocedal
and Wright 2006, equation 6.17). From M_0 = D, any positive diagonal, that is at any time

    M = K + P D Pᵀ,    K⁺ = V K Vᵀ + ρ s sᵀ,    P⁺ = V P,    K_0 = 0, P_0 = I.

K is what is *known* of the inverse Hessian, and P leads to the directions of which nothing is known yet:
after pairs that are conjugate to each other, P is a projection that annihilates theirs. So D may be chosen
anew at every step, as L-BFGS does with its H_0, and known and unknown directions can be scaled apart.

Shapes: ``*`` independent problems, N coordinates of one; all vectors (*, N), scalars of a problem (*, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_scale.optimizers.memory import DenseMemory
from l2l_scale.tree import Tree, tree_map


def dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb over the coordinates, (*, 1)."""
    return (a * b).sum(-1, keepdim=True)


def norm(a: Tensor) -> Tensor:
    """‖a‖ over the coordinates, (*, 1); its derivative at zero is zero."""
    square = dot(a, a)
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def reciprocal(value: Tensor, where: Tensor) -> Tensor:
    """1 / value where a mask says so, else 0; without NaN in the derivative elsewhere.

    Zero also where the value is so small that the derivative, −1 / value², would overflow.
    """
    usable = where & (value.abs() > torch.finfo(value.dtype).tiny ** 0.5)
    return (1 / torch.where(usable, value, 1.0)).masked_fill(~usable, 0.0)


class Outer(NamedTuple):
    """The vectors of outer products Σ_w a_w b_wᵀ, each (*, N, W)."""

    a: Tensor
    b: Tensor


def inverse_hessian_write(s: Tensor, y: Tensor, my: Tensor, rho: Tensor) -> Outer:
    """What BFGS writes into M: −ρ s (My)ᵀ + (−ρ My + (ρ + ρ² yᵀMy) s) sᵀ, two outer products.

    Args:
        s: step.
        y: change of the gradient.
        my: M y.
        rho: 1 / sᵀy; zero writes nothing.
    """
    second = (rho + rho.square() * dot(y, my)) * s - rho * my
    return Outer(torch.stack((-rho * s, second), -1), torch.stack((my, s), -1))


class SecantMemory(ABC):
    """A storage of K and P. It holds settings only; what was written is in the tree that methods pass on."""

    @abstractmethod
    def init(self, theta: Tensor) -> Tree:
        """K = 0 and P = I."""

    @abstractmethod
    def holds_all(self, size: int) -> bool:
        """Whether as many pairs as there are coordinates are remembered, so that nothing is unknown then."""

    @abstractmethod
    def known(self, memory: Tree, v: Tensor) -> Tensor:
        """K v."""

    @abstractmethod
    def unknown(self, memory: Tree, v: Tensor) -> Tensor:
        """P v."""

    @abstractmethod
    def unknown_transposed(self, memory: Tree, v: Tensor) -> Tensor:
        """Pᵀ v."""

    @abstractmethod
    def write(self, memory: Tree, s: Tensor, y: Tensor, where: Tensor) -> Tree:
        """Write pairs with sᵀy > 0, in the problems that ``where`` (*, 1) names."""

    @abstractmethod
    def clear(self, memory: Tree, unknown: Tensor, everything: Tensor) -> Tree:
        """Set P to zero, or start again with K = 0 and P = I, in the problems that the masks (*, 1) name."""


class DenseSecants(NamedTuple):
    """K and P, (*, N, N) each."""

    known: Tensor
    unknown: Tensor


class DenseSecantMemory(SecantMemory):
    """K and P as matrices: two shared memories whose heads write the outer products of BFGS."""

    _KNOWN, _UNKNOWN = DenseMemory(0.0), DenseMemory(1.0)

    def holds_all(self, size: int) -> bool:
        """Always."""
        return True

    def init(self, theta: Tensor) -> DenseSecants:
        """K = 0 and P = I."""
        return DenseSecants(self._KNOWN.init(theta), self._UNKNOWN.init(theta))

    def known(self, memory: Tree, v: Tensor) -> Tensor:
        """K v."""
        return _times(memory.known, v)

    def unknown(self, memory: Tree, v: Tensor) -> Tensor:
        """P v."""
        return _times(memory.unknown, v)

    def unknown_transposed(self, memory: Tree, v: Tensor) -> Tensor:
        """Pᵀ v."""
        return _times(memory.unknown.mT, v)

    def write(self, memory: Tree, s: Tensor, y: Tensor, where: Tensor) -> DenseSecants:
        """Write two outer products into K, and −ρ s (Pᵀy)ᵀ into P."""
        rho = reciprocal(dot(s, y), where)
        a, b = inverse_hessian_write(s, y, self.known(memory, y), rho)
        left, right = -(rho * s).unsqueeze(-1), self.unknown_transposed(memory, y).unsqueeze(-1)
        known = self._KNOWN.write(memory.known, a, b)
        return DenseSecants(known, self._UNKNOWN.write(memory.unknown, left, right))

    def clear(self, memory: Tree, unknown: Tensor, everything: Tensor) -> DenseSecants:
        """Zeros and identities."""
        nothing, again = unknown.unsqueeze(-1), everything.unsqueeze(-1)
        identity = torch.eye(memory.known.shape[-1], dtype=memory.known.dtype, device=memory.known.device)
        projection = memory.unknown.masked_fill(nothing, 0.0)
        return DenseSecants(memory.known.masked_fill(again, 0.0), torch.where(again, identity, projection))


class Pairs(NamedTuple):
    """The last pairs, the oldest first; where ρ is zero there is none."""

    s: Tensor
    """(*, m, N)"""
    y: Tensor
    """(*, m, N)"""
    rho: Tensor
    """(*, m)"""
    open: Tensor
    """(*, 1): one, or zero where P was set to zero."""


class WindowedSecantMemory(SecantMemory):
    """The last pairs themselves: L-BFGS (Nocedal and Wright 2006, algorithm 7.4). N · 2m numbers.

    P is a product of V's, and K is applied by the two-loop recursion, so a pair that leaves the window is
    forgotten as in L-BFGS: K and P are those of the pairs that are left.

    Args:
        pairs: m, how many the window holds.
    """

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs

    def holds_all(self, size: int) -> bool:
        """If the window is as long as a problem has coordinates."""
        return self.pairs >= size

    def init(self, theta: Tensor) -> Pairs:
        """No pair."""
        shape = (*theta.shape[:-1], self.pairs)
        zeros = theta.new_zeros(*shape, theta.shape[-1])
        return Pairs(zeros, zeros, theta.new_zeros(shape), torch.ones_like(theta[..., :1]))

    def known(self, memory: Tree, v: Tensor) -> Tensor:
        """K v, by the two-loop recursion without its middle."""
        _, alphas = self._first_loop(memory, v)
        result = torch.zeros_like(v)
        for i, alpha in enumerate(reversed(alphas)):
            s, y, rho = _pair(memory, i)
            result = result + (alpha - rho * dot(y, result)) * s
        return result

    def unknown(self, memory: Tree, v: Tensor) -> Tensor:
        """P v."""
        for i in range(self.pairs):
            s, y, rho = _pair(memory, i)
            v = v - rho * dot(y, v) * s
        result: Tensor = memory.open * v
        return result

    def unknown_transposed(self, memory: Tree, v: Tensor) -> Tensor:
        """Pᵀ v."""
        result: Tensor = memory.open * self._first_loop(memory, v)[0]
        return result

    def _first_loop(self, memory: Tree, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """v after the first loop, and the α of the pairs, the newest first."""
        alphas = []
        for i in reversed(range(self.pairs)):
            s, y, rho = _pair(memory, i)
            alphas.append(rho * dot(s, v))
            v = v - alphas[-1] * y
        return v, alphas

    def write(self, memory: Tree, s: Tensor, y: Tensor, where: Tensor) -> Pairs:
        """Append a pair, and drop the oldest one."""
        mask, rho = where.unsqueeze(-1), reciprocal(dot(s, y), where)

        def append(kept: Tensor, new: Tensor) -> Tensor:
            return torch.where(mask, torch.cat((kept[..., 1:, :], new.unsqueeze(-2)), -2), kept)

        rhos = append(memory.rho.unsqueeze(-1), rho).squeeze(-1)
        return Pairs(append(memory.s, s), append(memory.y, y), rhos, memory.open)

    def clear(self, memory: Tree, unknown: Tensor, everything: Tensor) -> Pairs:
        """Close P, or forget all pairs."""
        s, y = tree_map(lambda leaf: leaf.masked_fill(everything.unsqueeze(-1), 0.0), (memory.s, memory.y))
        closed = memory.open.masked_fill(unknown, 0.0).masked_fill(everything, 1.0)
        return Pairs(s, y, memory.rho.masked_fill(everything, 0.0), closed)


def _pair(memory: Pairs, i: int) -> tuple[Tensor, Tensor, Tensor]:
    return memory.s[..., i, :], memory.y[..., i, :], memory.rho[..., i : i + 1]


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)
