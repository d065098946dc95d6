"""Which precisions meta-training works in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("32-true", "64-true", "bf16-mixed")
"""Of Lightning's."""


_SHORT = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "None": "32-true"}


def check_precision(precision: object) -> None:
    """Raise ``ValueError`` for one that loses what is learned from.

    Args:
        precision: as it was written for the trainer, which makes bf16-mixed of 16-mixed on a CPU.
    """
    if _SHORT.get(str(precision), precision) not in PRECISIONS:
        raise ValueError(
            f"trainer.precision ({precision}) must be one of {', '.join(PRECISIONS)}: inner gradients "
            "span ten orders of magnitude and are the rule's input, so they underflow in float16, and small "
            "updates vanish beside a θ or φ of 16 bits. bf16-mixed computes the tasks in 16 bits and keeps "
            "rule, θ and state in 32"
        )


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """What bf16-mixed leaves as it is: all but the tasks, which switch autocast on for themselves."""
    if device.type == "meta":  # where memory is rehearsed; it knows no autocast
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
