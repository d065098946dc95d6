"""Any nn.Module with any loss as a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from l2l_scale.flat import FlatSpec
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors

Model: TypeAlias = Callable[..., Tensor]
"""The module with the parameters of the moment: call it like the module itself."""


@dataclass(frozen=True, kw_only=True)
class ModuleTask(TaskFamily):
    """The training of a module of your own.

    An example, small networks that learn sine waves of random phase::

        import numpy as np
        from torch import nn
        from l2l_scale.tasks import ModuleTask

        def build():
            return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

        def draw_task(rng):
            return {"phase": rng.uniform(0, np.pi, 1)}

        def draw_data(rng, task):
            x = rng.uniform(-3, 3, (32, 1))
            return {"x": x, "y": np.sin(x + task["phase"])}

        def objective(model, task, data):
            return nn.functional.mse_loss(model(data["x"]), data["y"])

        family = ModuleTask(build=build, objective=objective, draw_task=draw_task, draw_data=draw_data)

    Parameters that require gradients are the coordinates. All others, and buffers, are constants: those of
    one module that is built once, shared by all tasks. Arrays that are drawn arrive as tensors.

    Args:
        build: makes the module, initialised with torch's random numbers, on the CPU. The architecture must be
            the same in every call.
        objective: (model, task, data) to the loss, a scalar tensor; pure, in operations that torch.vmap can
            map over slots.
        draw_task: (rng) to the constants of one problem, named arrays; none if not given.
        draw_data: (rng, task) to one minibatch, named arrays; if not given the problem is deterministic.

    Raises:
        ValueError: if ``build`` makes no module, or one without parameters, or one that changes its buffers
            or draws random numbers when it is called.
    """

    build: Callable[[], nn.Module]
    objective: Callable[[Model, Tensors, Tensors], Tensor]
    draw_task: Callable[[np.random.Generator], Arrays] | None = None
    draw_data: Callable[[np.random.Generator, Arrays], Arrays] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise ValueError(f"build must return an nn.Module, but it returned {self.module!r}")
        for name, module in self.module.named_modules():
            _check_pure(name, module)
        _ = self.spec  # raises if there is no parameter

    def __repr__(self) -> str:
        """With the functions' names: a run that is resumed must find the same, whatever their addresses."""
        given = {name: getattr(self, name) for name in ("build", "objective", "draw_task", "draw_data")}
        named = (f"{name}={_name_of(function)}" for name, function in given.items() if function is not None)
        return f"ModuleTask({', '.join(named)})"

    @cached_property
    def module(self) -> nn.Module:
        """The module whose architecture and constants count; its parameters are never used."""
        return build_seeded(self.build, 0)

    @cached_property
    def spec(self) -> FlatSpec:
        """The module's parameters, grouped by kind; shared ones once."""
        shared_once = _trainable(self.module)
        segments = FlatSpec.of_module(self.module).segments
        return FlatSpec(tuple(segment for segment in segments if segment.name in shared_once))

    @property
    def has_data(self) -> bool:
        """Whether there are minibatches."""
        return self.draw_data is not None

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """What ``draw_task`` draws."""
        return {} if self.draw_task is None else self.draw_task(rng)

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """Build the module anew and flatten its parameters, (N,)."""
        module = build_seeded(self.build, int(rng.integers(1 << 63)))
        flat: np.ndarray = self.spec.flatten(_trainable(module)).numpy()
        return flat

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        """What ``draw_data`` draws."""
        return {} if self.draw_data is None else self.draw_data(rng, task)

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """The objective at these parameters."""
        theta = next(iter(params.values()))
        # While torch.compile looks on, without the cache: it would warn of it.
        find = _find_constants if torch.compiler.is_compiling() else _constants
        values = {**find(self, theta.device, theta.dtype), **params}
        value = self.objective(partial(functional_call, self.module, values), task, data)
        if value.dim() > 0:
            raise ValueError(
                f"objective must return a scalar, but its shape is {tuple(value.shape)}; take a mean"
            )
        return value


def _name_of(function: Callable[..., object]) -> str:
    """``module.name`` of a function; of another callable object that of its class."""
    plain = isinstance(function, FunctionType | BuiltinFunctionType | MethodType | type)
    named = function if plain else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def build_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a module whose initial parameters depend on the seed alone.

    The only place in the package where torch's global generator is drawn from: users initialise their
    modules with nn.init, which knows no other. It is seeded here, and left as it was found.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        return build()


def _trainable(module: nn.Module) -> Tensors:
    return {name: param.detach() for name, param in module.named_parameters() if param.requires_grad}


def _find_constants(family: ModuleTask, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Buffers and frozen parameters; floats in the precision of θ."""
    trainable = _trainable(family.module)
    every = {**dict(family.module.named_parameters()), **dict(family.module.named_buffers())}
    return {
        name: value.detach().to(device, dtype if value.is_floating_point() else None)
        for name, value in every.items()
        if name not in trainable
    }


_constants = lru_cache(maxsize=8)(_find_constants)


def _check_pure(name: str, module: nn.Module) -> None:
    """Raise ``ValueError`` if a call would change the module, or would differ from the call before."""
    what = f"build: module {name!r} ({type(module).__name__})"
    if not module.training:
        return
    if isinstance(module, _NormBase) and module.track_running_stats:
        raise ValueError(
            f"{what} changes its running statistics whenever it is called, but losses must be pure; "
            "build it with track_running_stats=False"
        )
    if isinstance(module, _DropoutNd) and module.p > 0:
        raise ValueError(
            f"{what} draws random numbers whenever it is called, but losses must be pure; build it with p=0"
        )
