"""Random quadratics, the first experiment of Andrychowicz et al. 2016 (section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from l2l_scale.checks import check_count, check_positive
from l2l_scale.flat import FlatSpec
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.test_functions import haar_orthogonal


@dataclass(frozen=True, kw_only=True)
class Quadratic(TaskFamily):
    """f(θ) = ‖Wθ − y‖², W of shape (dimension, dimension).

    Args:
        dimension: number of coordinates.
        distribution: "normal", entries of W and y iid N(0, 1) as in the paper; "uniform", iid U[0, 1) as in
            the authors' released code; or "decaying": y normal, and W of random (Haar) singular vectors with
            singular values that fall geometrically.
        decades: for "decaying", by how many powers of ten the eigenvalues of WᵀW fall from the first to the
            last, so that its condition number is 10^decades.
        w_scale: factor on W.
        y_scale: factor on y.
        theta0_scale: standard deviation of the start point, N(0, theta0_scale²); the released code has 0.01.

    Raises:
        ValueError: if the dimension is below 1, or a scale negative or not finite.
    """

    dimension: int = 10
    distribution: Literal["normal", "uniform", "decaying"] = "normal"
    decades: float = 4.0
    w_scale: float = 1.0
    y_scale: float = 1.0
    theta0_scale: float = 0.01

    def __post_init__(self) -> None:
        check_count("dimension", self.dimension)
        check_positive("w_scale", self.w_scale)
        check_positive("y_scale", self.y_scale, zero=True)
        check_positive("theta0_scale", self.theta0_scale, zero=True)
        check_positive("decades", self.decades, zero=True)
        if self.distribution not in ("normal", "uniform", "decaying"):
            raise ValueError(
                f"distribution ({self.distribution!r}) must be 'normal', 'uniform' or 'decaying'"
            )

    @cached_property
    def spec(self) -> FlatSpec:
        """One vector, theta."""
        return FlatSpec.single("theta", self.dimension)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Draw W (D, D) and y (D,)."""
        draw = rng.random if self.distribution == "uniform" else rng.standard_normal
        d = self.dimension
        w = self._decaying(rng) if self.distribution == "decaying" else draw((d, d))
        return {"w": self.w_scale * w, "y": self.y_scale * draw(d)}

    def _decaying(self, rng: np.random.Generator) -> np.ndarray:
        """Draw W with singular values from 1 down to 10^(−decades / 2), (D, D)."""
        values = 10.0 ** np.linspace(0, -self.decades / 2, self.dimension)
        left, right = haar_orthogonal(rng, self.dimension), haar_orthogonal(rng, self.dimension)
        w: np.ndarray = (left * values) @ right
        return w

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Draw θ0 ~ N(0, theta0_scale²)."""
        return self.theta0_scale * rng.standard_normal(self.dimension)

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """‖Wθ − y‖², over any leading axes."""
        residual = (task["w"] @ params["theta"].unsqueeze(-1)).squeeze(-1) - task["y"]
        return residual.square().sum(-1)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The same formula for all slots, without the cost of mapping."""
        return self.loss({"theta": theta}, task, data)

    def losses_and_gradients(
        self, theta: Tensor, task: Tensors, data: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        """‖r‖² and 2 Wᵀr, r = Wθ − y: the products that autograd would make, without its cost."""
        w = task["w"]
        residual = torch.bmm(w, theta.unsqueeze(-1)) - task["y"].unsqueeze(-1)
        grads = torch.bmm(w.mT, 2 * residual).squeeze(-1)
        return residual.square().sum((1, 2)), grads
