"""What optimizes φ."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn


def adam_along_a_cosine(
    parameters: Iterable[nn.Parameter], learning_rate: float, final_fraction: float, max_steps: int
) -> OptimizerLRSchedulerConfig:
    """Adam, its learning rate falling along a cosine over the run.

    Args:
        parameters: φ.
        learning_rate: at the first meta-step.
        final_fraction: share of it that is left at the last one; 1 keeps it constant.
        max_steps: meta-steps of the run.

    Raises:
        ValueError: if the rate is to fall in a run without an end.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    if max_steps < 1 and final_fraction < 1:
        raise ValueError(
            f"trainer.max_steps ({max_steps}) must be > 0 for a learning rate that falls to "
            f"final_fraction ({final_fraction}); set model.final_fraction=1 for an open-ended run"
        )

    def factor(step: int) -> float:
        if final_fraction == 1:
            return 1.0
        progress = min(step / max_steps, 1)
        return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
