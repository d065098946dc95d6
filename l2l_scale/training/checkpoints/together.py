"""What ranks do together though one of them may fail: then all of them fail, and none is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from l2l_scale.training.checkpoints.folder import DamagedError
from l2l_scale.training.ranks import world_size

T = TypeVar("T")


def all_or_none(function: Callable[[], T]) -> T:
    """Collective. Call a function whose result is too large to be sent around."""
    results: list[T] = []
    together(lambda: results.append(function()))
    return results[0]


def together(function: Callable[[], T]) -> list[T]:
    """Collective. Call a function on every rank; the results of all, in order.

    Raises:
        DamagedError: on all ranks, if it was raised on any.
        OSError: likewise.
        RuntimeError: likewise, for whatever else was raised.
    """
    if world_size() == 1:
        return [function()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:  # the others must not be left waiting, whatever it is
        failure = error
    kind = next((kind for kind in (DamagedError, OSError) if isinstance(failure, kind)), RuntimeError)
    text = str(failure) if kind is DamagedError else getattr(failure, "strerror", None) or repr(failure)
    everyone: list[tuple[Any, Any]] = [(None, None)] * world_size()
    dist.all_gather_object(everyone, (result, None if failure is None else (kind, text)))
    for number, (_, problem) in enumerate(everyone):
        if problem is not None:
            raise problem[0](f"{problem[1]} (on rank {number})") from failure
    return [value for value, _ in everyone]


def nothing() -> None:
    """What the other ranks do."""
