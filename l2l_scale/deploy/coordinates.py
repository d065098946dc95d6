"""One parameter group as one problem: its coordinates as (1, N), and back into the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where and in what precision the rule works for a group: at least float32, whatever the parameters."""

    device: torch.device
    dtype: torch.dtype


def layout_of(params: Sequence[Tensor]) -> Layout:
    """Where and in what precision to work on these parameters (at least one).

    Raises:
        ValueError: if one is complex or of integers, or if they lie on several devices.
    """
    devices, dtypes = {param.device for param in params}, {param.dtype for param in params}
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise ValueError(
                f"a parameter has dtype {dtype}, but rules know real floating-point numbers only"
            )
    if len(devices) > 1:
        names = sorted(str(device) for device in devices)
        raise ValueError(
            f"the parameters of one group must be on one device, but are on {names}; split the group"
        )
    return Layout(devices.pop(), reduce(torch.promote_types, dtypes, torch.float32))


def gradient_of(param: Tensor) -> Tensor:
    """The gradient of a parameter; zero where it has none.

    Raises:
        ValueError: if it is sparse.
    """
    if param.grad is None:
        return torch.zeros_like(param)
    if param.grad.layout is not torch.strided:
        raise ValueError(
            f"a gradient is sparse (parameter of shape {tuple(param.shape)}), but rules need dense ones: "
            "use Embedding(sparse=False), or give such parameters to another optimizer"
        )
    return param.grad


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return tensors as one problem, (1, N)."""
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]).unsqueeze(0)


def split(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Undo :func:`flatten`: views of ``flat`` (1, N) in the shapes of the parameters."""
    chunks = torch.split(flat.squeeze(0), [param.numel() for param in params])
    return [chunk.view(param.shape) for chunk, param in zip(chunks, params, strict=True)]


def read(params: Sequence[Tensor], dtype: torch.dtype, master: Tensor | None) -> Tensor:
    """θ (1, N): the master copy, but the parameters themselves where somebody has changed them."""
    now = flatten(params, dtype)
    if master is None:
        return now
    rounded = [part.to(param.dtype) for part, param in zip(split(master, params), params, strict=True)]
    return torch.where(flatten(rounded, dtype) == now, master, now)


def mask(update: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The update (1, N), set to zero in place where a parameter has no gradient."""
    if any(param.grad is None for param in params):
        for part, param in zip(split(update, params), params, strict=True):
            if param.grad is None:
                part.zero_()
    return update


def write(theta: Tensor, params: Sequence[Tensor]) -> None:
    """Round θ (1, N) into the parameters that have a gradient."""
    pairs = zip(params, split(theta, params), strict=True)
    moved = [(param, part) for param, part in pairs if param.grad is not None]
    torch._foreach_copy_([param for param, _ in moved], [part for _, part in moved])
