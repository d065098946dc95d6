"""Strong references for deterministic tasks: second-order and line-search methods of SciPy, in float64.

They are no update rules: a line search looks at several points before it moves. So they are counted in
evaluations of f together with ∇f, which is what one inner step of a rule costs. S tasks, N coordinates,
E evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.tasks.base import TaskFamily, Tensors
from l2l_scale.tree import tree_map
from l2l_scale.unroll import WindowBatch

Objective: TypeAlias = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""From θ (N,) to the loss and its gradient (N,)."""


class ReferenceMethod(Enum):
    """Which method; the value is SciPy's name of it."""

    BFGS = "BFGS"
    LBFGS = "L-BFGS-B"
    CONJUGATE_GRADIENT = "CG"

    @property
    def title(self) -> str:
        """What it is, for tables."""
        return _TITLES[self]


_TITLES = {
    ReferenceMethod.BFGS: "BFGS, strong Wolfe line search (SciPy)",
    ReferenceMethod.LBFGS: "L-BFGS, memory 20, strong Wolfe line search (SciPy)",
    ReferenceMethod.CONJUGATE_GRADIENT: "conjugate gradient, Polak–Ribière, strong Wolfe line search (SciPy)",
}

# Tolerances of zero: a solver ends when it finds no lower loss, or by our own count of evaluations.
# c2 makes the line search of conjugate gradients nearly exact: SciPy's 0.4 needs far more evaluations here.
_OPTIONS = {
    ReferenceMethod.BFGS: {"gtol": 0.0, "xrtol": 0.0},
    ReferenceMethod.LBFGS: {"maxcor": 20, "ftol": 0.0, "gtol": 0.0, "maxls": 40, "maxfun": 10**9},
    ReferenceMethod.CONJUGATE_GRADIENT: {"gtol": 0.0, "c2": 0.01},
}


class _BudgetSpent(Exception):  # noqa: N818 - not an error
    """Leaves a solver that has had its evaluations."""


def reference_curves(
    method: ReferenceMethod, family: TaskFamily, batch: WindowBatch, evaluations: int
) -> Tensor:
    """Best loss found after 0, 1, … E evaluations beyond that of the start point, for every task.

    The loss after e evaluations compares with f(θ_e) of a rule: both have seen e gradients and then one
    more loss. A solver that ends early keeps its last best loss.

    Args:
        method: which method.
        family: without minibatches.
        batch: gives the tasks and their start points; computed with in float64.
        evaluations: E, at least 1.

    Returns:
        (E + 1, S), float64, on the CPU.

    Raises:
        ValueError: if the family has minibatches, or E is below 1.
    """
    check_count("evaluations", evaluations)
    if family.has_data:
        raise ValueError(
            f"{method.title} needs a deterministic loss, but {type(family).__name__} draws a minibatch for "
            f"every inner step, which a line search would take for a change of θ; leave this reference out"
        )
    task, theta0 = tree_map(_to_double, (batch.task, batch.theta0))
    curves = []
    with threadpool_limits(1):  # threads cost L-BFGS twenty times what such small vectors need
        for s, start in enumerate(theta0.numpy()):
            objective = _objective(family, tree_map(lambda leaf, s=s: leaf[s : s + 1], task))
            curves.append(_best_losses(method, objective, start, evaluations))
    return torch.from_numpy(np.stack(curves, axis=1))


def _to_double(leaf: Tensor) -> Tensor:
    leaf = leaf.detach().cpu()
    return leaf.double() if leaf.is_floating_point() else leaf


def _objective(family: TaskFamily, task: Tensors) -> Objective:
    """The loss of one task, whose constants have a slot axis of length one."""

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(x).unsqueeze(0).requires_grad_()
        with torch.enable_grad():
            loss = family.losses(theta, task, {})
            (grad,) = torch.autograd.grad(loss.sum(), theta)
        return loss.item(), grad.squeeze(0).numpy()

    return objective


def _best_losses(
    method: ReferenceMethod, objective: Objective, start: np.ndarray, evaluations: int
) -> np.ndarray:
    """Run the solver on one task; the best loss after 0 … E evaluations, (E + 1,)."""
    seen: list[float] = []

    def counted(x: np.ndarray) -> tuple[float, np.ndarray]:
        if len(seen) > evaluations:
            raise _BudgetSpent
        loss, grad = objective(x)
        seen.append(loss)
        return loss, grad

    options = _OPTIONS[method] | {"maxiter": evaluations}
    try:
        # A diverging step is the solver's own business; it shows in the curve.
        with np.errstate(all="ignore"):
            minimize(counted, start, jac=True, method=method.value, options=options)
    except _BudgetSpent:
        pass
    best = np.fmin.accumulate(seen)
    return np.pad(best, (0, evaluations + 1 - len(best)), mode="edge")
