"""What a machine can do at most, and the floating-point work of a coordinate-step."""

from __future__ import annotations

from typing import NamedTuple

HIDDEN, FEATURES, LAYERS = 20, 2, 2


class Machine(NamedTuple):
    """Measured peaks per CPU second of one thread, while all threads work: other load does not lower them."""

    flops: float
    """Floating-point operations in float32; a multiply-add is two."""
    bandwidth: float
    """Bytes of a large copy, read and written ones."""
    vectors: str
    """The instruction set of torch's own kernels."""


def forward_flops(hidden: int, features: int, layers: int) -> int:
    """Multiply-adds (as two operations each) of one coordinate's inner step; elementwise work is not counted.

    A layer with I inputs multiplies a (4H, I + H) matrix by a vector, the output layer a (1, H) one:
    2·4H·(F + H) + (L − 1)·2·4H·2H + 2H.
    """
    first = 2 * 4 * hidden * (features + hidden)
    others = (layers - 1) * 2 * 4 * hidden * 2 * hidden
    return first + others + 2 * hidden


def useful_flops(hidden: int, features: int, layers: int, input_gradient: bool = False) -> int:
    """Forward and backward: every product is differentiated with respect to both its factors.

    In first order the gradient that enters is a constant, so the features need no derivative, which saves
    2·4H·F. For H = 20, F = 2, L = 2: 29,560.
    """
    unneeded = 0 if input_gradient else 2 * 4 * hidden * features
    return 3 * forward_flops(hidden, features, layers) - unneeded


def recompute_flops(hidden: int, features: int, layers: int, input_gradient: bool = False) -> int:
    """The same where backward computes the step again instead of keeping it: 39,520."""
    return useful_flops(hidden, features, layers, input_gradient) + forward_flops(hidden, features, layers)


def flops_of(backend: str) -> int:
    """Useful operations per coordinate-step of a backend on our workloads."""
    return useful_flops(HIDDEN, FEATURES, LAYERS, input_gradient=backend.endswith("-true"))
