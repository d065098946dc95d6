"""What the trajectories of validation tasks come to: the numbers that choose a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def validation_metrics(curves: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Scalars from the loss curves (T, S) of every family.

    - ``valid/sum``: mean over the tasks of f(θ_1) + … + f(θ_T);
    - ``valid/final``: mean of f(θ_T); ``valid/final_median``: its median.

    Of a mixture each family has its own (``valid/sum/NAME``), and those without a name are their
    :func:`weighted_mean`.

    Args:
        curves: by the family's name in the mixture.
        weights: of the families; they sum to 1.
    """
    each = {
        name: {
            "valid/sum": losses.sum(0).mean(),
            "valid/final": losses[-1].mean(),
            "valid/final_median": losses[-1].median(),
        }
        for name, losses in curves.items()
    }
    metrics = next(iter(each.values())).keys()
    of_all = {
        metric: weighted_mean({name: values[metric] for name, values in each.items()}, weights)
        for metric in metrics
    }
    if list(each) == [""]:
        return of_all
    by_name = {f"{metric}/{name}": values[metric] for name, values in each.items() for metric in metrics}
    return of_all | by_name


def weighted_mean(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The geometric mean, which does not ask for the families' scales; the arithmetic one below zero.

    Of a single value it is the value itself.
    """
    if len(values) == 1:
        return next(iter(values.values()))
    stacked = torch.stack(list(values.values()))
    shares = stacked.new_tensor([weights[name] for name in values])
    if bool((stacked > 0).all()):
        return (shares * stacked.log()).sum().exp()
    return (shares * stacked).sum()


def monitored(metrics: Mapping[str, Tensor], name: str) -> float:
    """The metric that chooses the best φ.

    Raises:
        ValueError: if it is not logged.
    """
    if name not in metrics:
        known = ", ".join(sorted(name for name in metrics if name.startswith("valid/")))
        raise ValueError(f"checkpoint.monitor ({name}) is not logged; choose one of {known}")
    return float(metrics[name])
