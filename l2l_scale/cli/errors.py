"""The nearest name that would have been right, for a mistake that an argument parser complained about."""

from __future__ import annotations

import inspect
import re
from argparse import ArgumentParser
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module

_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: --([\w.]+)")
_UNKNOWN_IN_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
_UNKNOWN_IN_CLASS = re.compile(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted")
_NOT_A_CLASS = re.compile(r"Expected a dot import path string: (\w+)")


def suggest(wrong: str, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where nothing is near."""
    near = get_close_matches(wrong, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def suggestion(text: str, parser: ArgumentParser) -> str:
    """What to append to the parser's complaint ``text``."""
    keys = [action.dest for action in parser._actions]
    if found := _UNKNOWN_ARGUMENT.search(text):
        return suggest(found[1], keys)
    if found := _UNKNOWN_IN_GROUP.search(text):
        prefix = found[1] + "."
        return suggest(found[2], [key[len(prefix) :] for key in keys if key.startswith(prefix)])
    if found := _UNKNOWN_IN_CLASS.search(text):
        module, _, name = found[1].rpartition(".")
        return suggest(found[2], inspect.signature(getattr(import_module(module), name)).parameters)
    if found := _NOT_A_CLASS.search(text):
        return suggest(found[1], _known_classes())
    return ""


def _known_classes() -> list[str]:
    packages = ("tasks", "optimizers", "estimators", "training")
    return [name for package in packages for name in import_module(f"l2l_scale.{package}").__all__]
