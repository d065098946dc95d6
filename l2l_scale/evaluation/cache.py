"""Results kept on disk under a key that holds everything they depend on, or not kept at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch

JSON: TypeAlias = Any
"""What ``json`` reads and writes."""


class NotDescribableError(Exception):
    """A setting whose value cannot be told from its text, so that no key can stand for it."""


def default_folder() -> Path:
    """Where results are kept: ``$XDG_CACHE_HOME/l2l_scale``, by default ``~/.cache/l2l_scale``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2l_scale"


def describe(value: object) -> JSON:
    """Write a setting out as JSON, dataclasses of this package with class and all fields.

    Raises:
        NotDescribableError: at an object of another class. Its code is not part of the key (see
            :func:`code_digest`), so a result could outlive a change of it.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Path, torch.dtype)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): describe(entry) for key, entry in value.items()}
    kind = type(value)
    if not dataclasses.is_dataclass(value) or kind.__module__.split(".")[0] != "l2l_scale":
        raise NotDescribableError(f"{kind.__module__}.{kind.__qualname__}")
    fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **fields}


@lru_cache
def code_digest() -> str:
    """Hash of the package's own code and of the versions of the libraries that compute with it."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(f"{platform.python_version()} {torch.__version__} {numpy.__version__}".encode())
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def remember(folder: Path | None, settings: dict[str, object], compute: Callable[[], JSON]) -> JSON:
    """Return ``compute()``, or what it returned before under the same settings and the same code.

    The file holds the whole key, which is compared: neither a collision nor a damaged or foreign file can
    give a wrong result. Such a file is computed again and replaced.

    Args:
        folder: where results are kept; None keeps nothing.
        settings: everything that the result depends on besides the code.
        compute: gives the result, as JSON.
    """
    try:
        key = {"code": code_digest(), **{name: describe(value) for name, value in settings.items()}}
    except NotDescribableError:
        folder = None
    if folder is None:
        return compute()
    text = json.dumps(key, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    stored = _read(path)
    if stored is not None and json.dumps(stored["key"], sort_keys=True) == text:
        return stored["result"]
    result = compute()
    _write(path, {"key": key, "result": result, "check": _check(result)})
    return result


def _check(result: JSON) -> str:
    """Hash of a result, against damage of the file."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, JSON] | None:
    """The content of a whole and undamaged file, else None."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        whole = stored["check"] == _check(stored["result"]) and "key" in stored
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return stored if whole else None


def _write(path: Path, content: JSON) -> None:
    """Write a file that is there as a whole or not at all. A folder that cannot be written is no error."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
