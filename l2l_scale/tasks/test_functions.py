"""Classic test functions of optimization, randomly shifted, rotated and scaled.

Every function is written in u, the offset from its minimiser, and in terms that vanish one by one at u = 0:
so the minimum value is exactly 0, and small losses are exact in float32 too. Shapes: u (*, D), result (*).
Formulas: Surjanovic and Bingham, "Virtual Library of Simulation Experiments" (sfu.ca/~ssurjano).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from l2l_scale.checks import check_count, check_positive
from l2l_scale.flat import FlatSpec
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors

FunctionName = Literal["rosenbrock", "rastrigin", "ackley", "styblinski_tang", "beale", "booth"]

STYBLINSKI_TANG_MINIMISER = -2.903534027771177
"""The lowest root of 4z³ − 32z + 5, where every coordinate of the Styblinski–Tang function is minimal."""


def rosenbrock(u: Tensor) -> Tensor:
    """Σ 100 (z_{i+1} − z_i²)² + (1 − z_i)², minimal at z = 1; a narrow curved valley."""
    head, tail = u[..., :-1], u[..., 1:]
    return (100 * (tail - head * (head + 2)).square() + head.square()).sum(-1)


def rastrigin(u: Tensor) -> Tensor:
    """10 D + Σ z_i² − 10 cos 2πz_i, minimal at z = 0; many regular local minima."""
    return (u.square() + 20 * (math.pi * u).sin().square()).sum(-1)


def ackley(u: Tensor) -> Tensor:
    """20 + e − 20 exp(−0.2 √(mean z²)) − exp(mean cos 2πz), minimal at z = 0.

    The minimiser is the tip of a cone, without a derivative; there the gradient given is 0.
    """
    mean_square = u.square().mean(-1)
    at_tip = mean_square == 0
    # The derivative of √ is infinite at 0, and infinity times zero is NaN: take another branch there.
    root = mean_square.masked_fill(at_tip, 1.0).sqrt().masked_fill(at_tip, 0.0)
    ripple = (math.pi * u).sin().square().mean(-1)
    return -20 * torch.expm1(-0.2 * root) - math.e * torch.expm1(-2 * ripple)


def styblinski_tang(u: Tensor) -> Tensor:
    """½ Σ z_i⁴ − 16 z_i² + 5 z_i less its minimum (−39.17 per coordinate); 2^D local minima."""
    z = STYBLINSKI_TANG_MINIMISER
    return (u.square() * (u.square() + 4 * z * u + (6 * z * z - 16))).sum(-1) / 2


def beale(u: Tensor) -> Tensor:
    """Σ_{i=1..3} (c_i − x + x yⁱ)² with c = 1.5, 2.25, 2.625, minimal at (3, 0.5); flat, with steep walls."""
    x, y = u[..., 0] + 3, u[..., 1] + 0.5
    terms = [(c - x * (1 - y**power)).square() for power, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
    return torch.stack(terms).sum(0)


def booth(u: Tensor) -> Tensor:
    """(x + 2y − 7)² + (2x + y − 5)², minimal at (1, 3); a convex quadratic."""
    x, y = u[..., 0], u[..., 1]
    return (x + 2 * y).square() + (2 * x + y).square()


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (rosenbrock, rastrigin, ackley, styblinski_tang, beale, booth)
}
_TWO_DIMENSIONAL = ("beale", "booth")


@dataclass(frozen=True, kw_only=True)
class TestFunction(TaskFamily):
    """A test function f of u = scale · R (θ − shift), so that f is 0 at θ = shift and nowhere lower.

    Args:
        function: which one.
        dimension: number of coordinates D; exactly 2 for Beale and Booth, at least 2 for Rosenbrock.
        shift_scale: standard deviation of the minimiser, N(0, shift_scale²).
        rotate: turn the coordinates by R, uniform (Haar) over the orthogonal matrices; else R is I.
        scale_range: the scale's lowest and highest value; log-uniform between them.
        theta0_scale: standard deviation of the start point, N(0, theta0_scale²).

    Raises:
        ValueError: if the function is unknown or not defined in this dimension, or a scale is out of range.
    """

    __test__: ClassVar[bool] = False  # not a class of tests, whatever pytest makes of its name

    function: FunctionName = "rosenbrock"
    dimension: int = 2
    shift_scale: float = 1.0
    rotate: bool = True
    scale_range: tuple[float, float] = (0.5, 2.0)
    theta0_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_range", tuple(self.scale_range))  # a list would not be hashable
        if self.function not in _FUNCTIONS:
            raise ValueError(
                f"function ({self.function!r}) must be one of {', '.join(get_args(FunctionName))}"
            )
        check_count("dimension", self.dimension)
        if self.function in _TWO_DIMENSIONAL and self.dimension != 2:
            raise ValueError(f"dimension ({self.dimension}) must be 2: {self.function} has no other")
        if self.function == "rosenbrock" and self.dimension < 2:
            raise ValueError(f"dimension ({self.dimension}) must be at least 2 for rosenbrock")
        check_positive("shift_scale", self.shift_scale, zero=True)
        check_positive("theta0_scale", self.theta0_scale, zero=True)
        for value in self.scale_range:
            check_positive("scale_range", value)
        if len(self.scale_range) != 2 or self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f"scale_range ({self.scale_range}) must be two numbers, the lower one first")

    @cached_property
    def spec(self) -> FlatSpec:
        """One vector, theta."""
        return FlatSpec.single("theta", self.dimension)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Draw shift (D,), scale () and, if rotated, rotation (D, D)."""
        low, high = np.log(self.scale_range)
        task: Arrays = {
            "shift": self.shift_scale * rng.standard_normal(self.dimension),
            "scale": np.asarray(np.exp(rng.uniform(low, high))),
        }
        return {**task, "rotation": haar_orthogonal(rng, self.dimension)} if self.rotate else task

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Draw θ0 ~ N(0, theta0_scale²)."""
        return self.theta0_scale * rng.standard_normal(self.dimension)

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """The function's value, over any leading axes."""
        offset = params["theta"] - task["shift"]
        if self.rotate:
            offset = (task["rotation"] @ offset.unsqueeze(-1)).squeeze(-1)
        return _FUNCTIONS[self.function](task["scale"].unsqueeze(-1) * offset)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The same formula for all slots, without the cost of mapping."""
        return self.loss({"theta": theta}, task, data)


def haar_orthogonal(rng: np.random.Generator, dimension: int) -> np.ndarray:
    """Draw an orthogonal matrix (D, D), uniform over all of them, reflections too.

    The Q of a Gaussian matrix is uniform only with the signs of R's diagonal fixed [Mezzadri 2007, "How to
    generate random matrices from the classical compact groups"].
    """
    q, r = np.linalg.qr(rng.standard_normal((dimension, dimension)))
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
