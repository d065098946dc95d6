"""Objects as JSON and back: a rule is its class's name and the arguments of its ``__init__``.

Every rule, feature and head keeps its ``__init__`` arguments as attributes of the same names, so nothing
has to be written twice (scikit-learn's ``get_params`` rests on the same convention). Numbers, strings,
booleans, None and lists stand for themselves; {"class", "init_args"} is an object, and {"tuple": [...]},
{"dict": {...}} and {"tensor": [...], "dtype": "float64"} are what they say.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l2l_scale import optimizers

PACKAGE: dict[str, type] = {name: getattr(optimizers, name) for name in optimizers.__all__}
"""The classes that every description may use, by name."""

_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.int64, torch.bool)}


def describe(value: object, classes: dict[str, type] | None = None) -> Any:
    """Return a rule, or an argument of one, as JSON.

    Args:
        value: what to describe.
        classes: by name, the package's if not given; those that the description needs are added to it.

    Raises:
        ValueError: if it cannot be described, or if two classes have one name.
    """
    classes = dict(PACKAGE) if classes is None else classes
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, nn.ModuleList)):
        return [describe(entry, classes) for entry in value]
    if type(value) is tuple:
        return {"tuple": [describe(entry, classes) for entry in value]}
    if isinstance(value, (dict, nn.ModuleDict)):
        return {"dict": {str(key): describe(entry, classes) for key, entry in value.items()}}
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    cls = type(value)
    if classes.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"{cls} and {classes[cls.__name__]} have one name; rename yours")
    args = _init_args(value)
    return {"class": cls.__name__, "init_args": {key: describe(arg, classes) for key, arg in args.items()}}


def build(node: Any, classes: Mapping[str, type] | None = None) -> Any:
    """Undo :func:`describe`: on the CPU, with a fresh φ, leaving torch's random state as it was.

    Args:
        node: the description.
        classes: by name, all that it may use; the package's if not given.

    Raises:
        ValueError: if a class is unknown or refuses its arguments.
    """
    classes = PACKAGE if classes is None else classes
    if isinstance(node, list):
        return [build(entry, classes) for entry in node]
    if not isinstance(node, dict):
        return node
    if "tuple" in node:
        return tuple(build(entry, classes) for entry in node["tuple"])
    if "dict" in node:
        return {key: build(entry, classes) for key, entry in node["dict"].items()}
    if "tensor" in node:
        return torch.tensor(node["tensor"], dtype=_DTYPES[node["dtype"]], device="cpu")
    name, init_args = node["class"], node["init_args"]
    if name not in classes:
        raise ValueError(
            f"the class {name!r} is not one of l2l_scale.optimizers; "
            f"if it is yours, pass it: load_rule(path, classes=[{name}])"
        )
    args = {key: build(arg, classes) for key, arg in init_args.items()}
    try:
        with torch.device("cpu"), _random_state_kept():
            return classes[name](**args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built from its saved arguments: {error}") from error


def _init_args(part: object) -> dict[str, object]:
    """Return the arguments that an object was made with, read from its attributes."""
    cls = type(part)
    if cls.__init__ in (object.__init__, nn.Module.__init__):
        return {}
    args = {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        name = parameter.name
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(
                f"{cls.__name__}.__init__ takes {parameter}; only arguments with names can be saved"
            )
        try:
            args[name] = getattr(part, name)
        except AttributeError as error:
            raise ValueError(
                f"cannot save a {cls.__name__}: it must keep its __init__ argument {name!r} as an attribute "
                f"of the same name (rules are made of plain values and of objects that do so)"
            ) from error
    return args


def _describe_tensor(value: Tensor) -> dict[str, Any]:
    """Return a tensor of hyper-parameters as nested lists; exact, as Python's floats are float64."""
    dtype = str(value.dtype)
    if dtype not in _DTYPES:
        raise ValueError(
            f"a tensor among the arguments has dtype {dtype}, but must have one of {list(_DTYPES)}"
        )
    return {"tensor": value.tolist(), "dtype": dtype}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Building a rule draws its initial φ; whoever loads a rule must not see that."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
