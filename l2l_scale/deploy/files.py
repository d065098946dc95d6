"""Rules as files: one safetensors file with φ, and a JSON header that says how to build the rule.

Nothing in a file is executed or imported: classes are looked up in ``l2l_scale.optimizers.__all__`` and among
those that the caller passes. The header is the entry "header" of the file's ``__metadata__``:

    {"format": "l2l_scale.rule", "version": 1, "l2l_scale": "0.1.0", "sha256": "...",
     "rule": {"class": "CoordinatewiseLSTM", "init_args": {"hidden_size": 20, ...}}, "metadata": {...}}

:mod:`l2l_scale.deploy.description` says what can stand among the ``init_args``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from l2l_scale.deploy.description import build_rule, classes_of, describe_rule
from l2l_scale.deploy.pretrained import find_rule
from l2l_scale.files import write_atomically
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.grouped import Grouped

FORMAT = "l2l_scale.rule"
VERSION = 1


def save_rule(rule: UpdateRule, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a rule to one file, atomically: a reader sees the old file or the new one, never a part.

    Args:
        rule: of the package, or of a class of yours that keeps its ``__init__`` arguments as attributes.
        path: where to; by custom it ends in ``.safetensors``. Missing folders are made.
        metadata: notes for people (what the rule was trained on, how long, ...), kept as JSON.

    Returns:
        The path.

    Raises:
        ValueError: if the rule cannot be rebuilt from its ``__init__`` arguments, or the notes are no JSON.
    """
    description, classes = describe_rule(rule), classes_of(rule)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in rule.state_dict().items()}
    build_rule(description, tensors, classes)  # what cannot be read back must not be written
    header = {
        "format": FORMAT,
        "version": VERSION,
        "l2l_scale": _package_version(),
        "sha256": _digest(description, tensors),
        "rule": description,
        "metadata": dict(metadata or {}),
    }
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata ({metadata}) must hold JSON values only: {error}") from error
    write_atomically(Path(path), save(tensors, metadata={"header": text}))
    return Path(path)


def load_rule(path: str | Path, classes: Sequence[type] = ()) -> UpdateRule:
    """Build the rule that a file holds: on the CPU, bit for bit, in the precision it was saved in.

    Args:
        path: a file written by :func:`save_rule` or ``l2l-scale export``, a folder with a
            ``rule.safetensors``, or the name of a rule that comes with the package
            (``l2l-scale pretrained`` lists them).
        classes: your own classes that the rule is made of; the package's are known.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no rule file, is damaged, is of a newer version or names an unknown class.
    """
    header, tensors = _read(find_rule(path))
    try:
        return build_rule(header["rule"], tensors, classes)
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from error


def take_over(rule: UpdateRule, path: str | Path) -> None:
    """Give a rule the φ of a file, in place: to train a rule further on other tasks.

    Args:
        rule: of the form of the file's; or grouped, and each of its rules of that form: all of them then
            begin with the same φ.
        path: as for :func:`load_rule`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no rule file, is damaged, or the rule is of another form.
    """
    header, tensors = _read(find_rule(path))
    whole = header["rule"] == describe_rule(rule)
    takers = list(rule.rules.values()) if isinstance(rule, Grouped) and not whole else [rule]
    for form in (describe_rule(cast("UpdateRule", taker)) for taker in takers):
        if form != header["rule"]:
            raise ValueError(
                f"the rule must be of the form of the one to start from, {path}: that is {header['rule']}, "
                f"and this one is {form}"
            )
    for taker in takers:
        taker.load_state_dict(tensors)


def read_header(path: str | Path) -> dict[str, Any]:
    """Return a rule file's header (see the top of this module) without building the rule.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no rule file, is damaged or is of a newer version.
    """
    return _read(find_rule(path))[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a file's header and tensors, checked."""
    try:
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no Mapping
    except SafetensorError as error:
        raise ValueError(_why_unreadable(path, error)) from error
    header = _parse_header(path, texts.get("header", "null"))
    if _digest(header.get("rule"), tensors) != header.get("sha256"):
        raise ValueError(f"{path} is damaged (its checksum does not match); copy or export it again")
    return header, tensors


def _parse_header(path: Path, text: str) -> dict[str, Any]:
    """Return the header of a version that this code knows."""
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged (its header is no JSON); copy or export it again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not of a rule: `l2l-scale export` writes rule files"
        )
    if header.get("version", 0) > VERSION:
        raise ValueError(
            f"{path} has format version {header['version']}, but l2l_scale {_package_version()} knows up to "
            f"{VERSION}; it was written by l2l_scale {header.get('l2l_scale')}: upgrade to that"
        )
    return header


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say what a file that safetensors refuses may be, and what to do."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"  # torch.save and so Lightning write zip files
    if is_zip or path.suffix == ".ckpt":
        return f"{path} is a training checkpoint, not a rule file; `l2l-scale export` makes one of it"
    return f"{path} is not a safetensors file, or is truncated ({error}); copy or export it again"


def _digest(description: object, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the rule: safetensors itself does not notice flipped bits."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _package_version() -> str:
    """Return the installed version; a bare source tree has none."""
    try:
        return version("l2l_scale")
    except PackageNotFoundError:
        return "unknown"
