"""Objects as JSON and back: a rule is its class's name and the arguments of its ``__init__``.

Every rule, feature and head keeps its ``__init__`` arguments as attributes of the same names, so nothing
has to be written twice (scikit-learn's ``get_params`` rests on the same convention). Numbers, strings,
booleans, None and lists stand for themselves; {"class", "init_args"} is an object, and {"tuple": [...]},
{"dict": {...}} and {"tensor": [...], "dtype": "float64"} are what they say.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l2l_scale import optimizers
from l2l_scale.optimizers.base import UpdateRule

PACKAGE: dict[str, type] = {name: getattr(optimizers, name) for name in optimizers.__all__}
"""The classes that every description may use, by name."""

_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.int64, torch.bool)}


def describe_rule(rule: UpdateRule) -> dict[str, Any]:
    """Return a rule as JSON, without its φ.

    Raises:
        ValueError: if it is not made of plain values and of objects that keep their ``__init__`` arguments,
            or if two of its classes have one name.
    """
    description: dict[str, Any] = _describe(rule, dict(PACKAGE))
    return description


def classes_of(rule: UpdateRule) -> list[type]:
    """Return the classes that a rule is made of besides the package's own.

    Raises:
        ValueError: as :func:`describe_rule`.
    """
    classes = dict(PACKAGE)
    _describe(rule, classes)
    return [cls for name, cls in classes.items() if name not in PACKAGE]


def build_rule(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], classes: Sequence[type] = ()
) -> UpdateRule:
    """Build a rule on the CPU, with φ in the precision of ``tensors``; torch's random state stays as it was.

    Args:
        description: from :func:`describe_rule`.
        tensors: its ``state_dict``.
        classes: what it may name besides the package's own classes.

    Raises:
        ValueError: if a class is unknown or refuses its arguments, or if the tensors do not fit.
    """
    with torch.device("cpu"), _random_state_kept():
        rule = _build(description, {**PACKAGE, **{cls.__name__: cls for cls in classes}})
    if not isinstance(rule, UpdateRule):
        raise ValueError(f"a rule must be a subclass of UpdateRule, not a {type(rule).__name__}")
    own = rule.state_dict(keep_vars=True)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if missing or unexpected or shapes:
        raise ValueError(
            f"the tensors do not fit the class {type(rule).__name__}: missing {missing}, "
            f"unexpected {unexpected}, of other shapes {shapes}; the class must be the one that was saved"
        )
    for name, tensor in own.items():
        tensor.data = tensors[name].detach().to("cpu", copy=True)
    return rule


def _describe(value: object, classes: dict[str, type]) -> Any:
    """Return an object, or an argument of one, as JSON; add the classes that it needs to ``classes``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, nn.ModuleList)):
        return [_describe(entry, classes) for entry in value]
    if type(value) is tuple:
        return {"tuple": [_describe(entry, classes) for entry in value]}
    if isinstance(value, (dict, nn.ModuleDict)):
        return {"dict": {str(key): _describe(entry, classes) for key, entry in value.items()}}
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    cls = type(value)
    if classes.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"{cls} and {classes[cls.__name__]} have one name; rename yours")
    args = _init_args(value)
    return {"class": cls.__name__, "init_args": {key: _describe(arg, classes) for key, arg in args.items()}}


def _build(node: Any, classes: Mapping[str, type]) -> Any:
    """Undo :func:`_describe`, with a fresh φ; ``classes`` by name are all that it may use."""
    if isinstance(node, list):
        return [_build(entry, classes) for entry in node]
    if not isinstance(node, dict):
        return node
    if "tuple" in node:
        return tuple(_build(entry, classes) for entry in node["tuple"])
    if "dict" in node:
        return {key: _build(entry, classes) for key, entry in node["dict"].items()}
    if "tensor" in node:
        return torch.tensor(node["tensor"], dtype=_DTYPES[node["dtype"]])
    name, init_args = node["class"], node["init_args"]
    if name not in classes:
        raise ValueError(
            f"the class {name!r} is not one of l2l_scale.optimizers; "
            f"if it is yours, pass it: load_rule(path, classes=[{name}])"
        )
    args = {key: _build(arg, classes) for key, arg in init_args.items()}
    try:
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
