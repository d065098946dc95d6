"""Convolutions of a VGG in a safetensors file, under torchvision's names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor


class Convolution(NamedTuple):
    """One convolution of the stack."""

    name: str
    """Its weights are ``name.weight`` and ``name.bias``, as in torchvision's VGG."""
    inputs: int
    outputs: int
    pooled: bool
    """Whether pooling comes before it: a new block begins."""


def read_stack(path: str) -> tuple[Convolution, ...]:
    """The stack of convolutions in a file, of which only the header is read."""
    shapes = {int(name.split(".")[1]): shape for name, shape in _shapes(path).items()}
    if 0 not in shapes:
        raise ValueError(
            f"weights ({path}) must hold features.0.weight and so on, as torchvision's VGG names them; "
            "rename its tensors"
        )
    stack: list[Convolution] = []
    before, last = 3, 0
    for number, shape in sorted(shapes.items()):
        name, step = f"features.{number}", number - last
        if len(shape) != 4 or shape[1:] != (before, 3, 3):
            raise ValueError(
                f"weights ({path}) must have {name}.weight of shape (outputs, {before}, 3, 3), but it is "
                f"{shape}; take a VGG without batch norm"
            )
        if stack and step not in (2, 3):
            raise ValueError(
                f"weights ({path}) must go on from features.{last} with features.{last + 2} (after a ReLU) "
                f"or features.{last + 3} (after a pooling too), but it goes on with {name}"
            )
        stack.append(Convolution(name, before, shape[0], pooled=step == 3))
        before, last = shape[0], number
    return tuple(stack)


def _shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in a file, by name, after a look for their biases."""
    if not Path(path).is_file():
        raise ValueError(
            f"weights ({path}) must be a safetensors file, but there is none; leave it out for random ones"
        )
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"weights ({path}) must be a safetensors file ({error}); convert others with "
            "safetensors.torch.save_file"
        ) from error
    found = {name: shape for name, shape in shapes.items() if re.fullmatch(r"features\.\d+\.weight", name)}
    for name, shape in found.items():
        bias = name.replace(".weight", ".bias")
        if shapes.get(bias) != shape[:1]:
            raise ValueError(
                f"weights ({path}) must have {bias} of shape {shape[:1]}, but it is {shapes.get(bias)}"
            )
    return found


def read_weights(path: str, stack: Sequence[Convolution]) -> list[tuple[Tensor, Tensor]]:
    """Weights (outputs, inputs, 3, 3) and biases (outputs,) of the stack, float32."""
    with safe_open(path, "pt") as file:
        return [
            (file.get_tensor(f"{conv.name}.weight").float(), file.get_tensor(f"{conv.name}.bias").float())
            for conv in stack
        ]
