"""Hyper-parameters of hand-designed rules: one number, or one number per slot.

With one value per slot a whole tuning grid is a single rollout. Numbers stay Python floats and grids are
kept in float64: neither loses precision in a float64 run, and neither makes a float32 run wider.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from l2l_scale.checks import check_positive

check_not_negative = partial(check_positive, zero=True)
"""Refuses what is below zero, infinite or NaN."""


def hyper(name: str, value: float | Tensor, check: Callable[[str, float], None]) -> float | Tensor:
    """Check a hyper-parameter, a number or a tensor of shape () or (S,), for a module to keep.

    A tensor becomes a buffer, so that it follows its module to another device. It is a setting and no
    result of training, so it is not part of the ``state_dict``.

    Raises:
        ValueError: if any of its values is refused by ``check``, or if it has more axes than the slots'.
    """
    if not isinstance(value, Tensor):
        check(name, value)
        return float(value)
    if value.dim() > 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, but must be one number or one per slot, shape (S,)"
        )
    for entry in value.reshape(-1).tolist():
        check(name, entry)
    return nn.Buffer(value.to(torch.float64, copy=True), persistent=False)


def per_problem(value: float | Tensor, like: Tensor) -> float | Tensor:
    """The hyper-parameter as a factor for ``like`` (*, N): a number, or (*, 1) in that precision."""
    return value.to(like).unsqueeze(-1) if isinstance(value, Tensor) else value
