"""Whether what a killed run left is whole, and whether a finished run is another one, bit for bit."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_scale.run_record import read_record
from l2l_scale.training.checkpoints.folder import (
    TRAINING,
    DamagedError,
    check_file,
    old_of,
    read_manifest,
    read_tensors,
)
from l2l_scale.training.checkpoints.shelf import LAST

WAITED = "train/waited"
"""The only metric that is a time."""
_ABSENT = object()


def damage(checkpoints: Path) -> list[str]:
    """What is wrong with the checkpoints that a killed run left: all that have a name must be whole."""
    found = [problem for path in checkpoints.glob("step-*") if (problem := _problem(path))]
    last = checkpoints / LAST
    if last.is_symlink():
        path = checkpoints / last.readlink()
        # A checkpoint that is being replaced waits beside its place; the next start puts it back.
        problem = _problem(path if path.exists() else old_of(path))
        found += [f"{last} points to no whole checkpoint: {problem}"] if problem else []
    return found


def differences(one: Path, two: Path) -> list[str]:
    """What differs between two run folders that are finished."""
    a, b = dict(_run(one)), dict(_run(two))
    return [
        name for name in sorted(a.keys() | b.keys()) if not _same(a.get(name, _ABSENT), b.get(name, _ABSENT))
    ]


def _problem(path: Path) -> str | None:
    """Why a checkpoint is not whole."""
    try:
        manifest = read_manifest(path)
        for name in manifest["files"]:
            check_file(path, name, manifest)
    except DamagedError as error:
        return str(error)
    return None


def _run(folder: Path) -> Iterator[tuple[str, Any]]:
    """All that must not depend on kills, by name."""
    checkpoints = folder / "checkpoints"
    last = (checkpoints / LAST).resolve()
    yield "names of the checkpoints", sorted(path.name for path in checkpoints.iterdir())
    yield "the last checkpoint's name", last.name
    yield "rule.safetensors", (folder / "rule.safetensors").read_bytes()
    yield "config.yaml", (folder / "config.yaml").read_text().replace(str(folder), "")
    record = read_record(folder)
    for key in ("state", "meta_step", "best"):
        yield f"run.json: {key}", json.dumps(record[key])  # type: ignore[literal-required]
    yield from _metrics(folder)
    yield from _flat(read_tensors(last / TRAINING), "checkpoint")
    for file in sorted(last.glob("slots-*")):
        yield from _flat(read_tensors(file), file.name)


def _metrics(folder: Path) -> Iterator[tuple[str, str]]:
    """What was logged at which meta-step, in any start of the run; of what was logged twice, the last."""
    pieces = folder.glob("metrics*.csv")  # a start with nothing left to train makes no file of its own
    values: dict[str, str] = {}
    for path in sorted(pieces, key=lambda path: path.stat().st_mtime):
        with path.open() as file:
            for row in csv.DictReader(file):
                step = row.pop("step")
                values |= {
                    f"{name} at {step}": value for name, value in row.items() if value and name != WAITED
                }
    yield from values.items()


def _flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries and lists, by path."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _flat(value, f"{path}.{key}")
    else:
        yield path, tree


def _same(a: Any, b: Any) -> bool:
    """Equal in every bit; NaN is NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
