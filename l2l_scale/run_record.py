"""The file ``run.json`` of a run folder: what a run says of itself, for ``l2l-scale runs`` to read.

Neither torch nor lightning is imported: who lists runs must not wait for them.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Any, Literal, TypeAlias, TypedDict, cast, get_args

import psutil

RUN_FILE = "run.json"
HEARTBEAT = 30.0
"""Seconds after which a running run writes its file again, at the next window."""
_SAME_START = 10.0
"""Seconds by which a process's start may seem to move when the clock of the machine is set."""

State: TypeAlias = Literal["running", "finished", "stopped", "requeued", "failed"]


class Best(TypedDict):
    """The best validation so far."""

    monitor: str
    """The metric that was best."""
    value: float
    meta_step: int


class RunRecord(TypedDict):
    """What ``run.json`` holds."""

    state: State
    message: str | None
    """Why it failed or stopped, in one line."""
    name: str
    host: str
    pid: int
    """Of rank 0."""
    process_started: float
    """When that process started, seconds since 1970: pids are used again."""
    slurm_job: str | None
    """JOB, or ARRAY_TASK of an array."""
    started: str
    """ISO 8601, UTC: when the run was started first."""
    updated: str
    starts: int
    """How many times it was started or resumed."""
    seconds: float
    """How long it has run, in all starts, without the time between them."""
    meta_step: int
    max_steps: int
    monitor: str | None
    """The metric that chooses the best checkpoint."""
    mode: str
    """"min" or "max"."""
    best: Best | None
    log: str | None
    """SLURM's log file."""


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("state", "name", "host", "started", "updated", "mode"), (str,)),
    **dict.fromkeys(("message", "slurm_job", "monitor", "log"), (str, NoneType)),
    **dict.fromkeys(("pid", "starts", "meta_step", "max_steps"), (int,)),
    "process_started": (int, float),
    "seconds": (int, float, EllipsisType),  # files of earlier versions do not have it
    "best": (dict, NoneType),
}
_BEST_TYPES: dict[str, tuple[type, ...]] = {"monitor": (str,), "value": (int, float), "meta_step": (int,)}


def now() -> str:
    """The time as ``run.json`` writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def age(moment: str) -> float:
    """Seconds since a time that :func:`now` wrote; never below 0, clocks differ between hosts."""
    return max(0.0, (datetime.now(timezone.utc) - datetime.fromisoformat(moment)).total_seconds())


def read_record(folder: Path) -> RunRecord:
    """Read ``run.json``.

    Raises:
        OSError: if it is not there or cannot be read.
        ValueError: if it is damaged.
    """
    content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    _check(content, _TYPES)
    if content["best"] is not None:
        _check(content["best"], _BEST_TYPES)
    if content["state"] not in get_args(State):
        raise ValueError(f"state ({content['state']}) must be one of {', '.join(get_args(State))}")
    for key in ("started", "updated"):
        if datetime.fromisoformat(content[key]).tzinfo is None:
            raise ValueError(f"{key} ({content[key]}) must say its time zone")
    started, updated = datetime.fromisoformat(content["started"]), datetime.fromisoformat(content["updated"])
    content.setdefault("seconds", (updated - started).total_seconds())
    return cast(RunRecord, content)


def _check(content: Any, types: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{content!r} must be a JSON object")
    for key, allowed in types.items():
        if not isinstance(content.get(key, ...), allowed):
            raise ValueError(f"{key} ({content.get(key)!r}) is missing or of a wrong type")


def is_alive(pid: int, process_started: float) -> bool:
    """Whether that very process of this host still runs."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return abs(process.create_time() - process_started) < _SAME_START
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # the latter: no such pid can be
        return False
