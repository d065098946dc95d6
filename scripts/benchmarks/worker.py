"""The child's side of a measurement: one (workload, backend, threads) in a process of its own.

A child prepares, says so, and then does one repetition per line it reads, so that its parent can interleave
children. Only the standard library is needed: the JAX peer may run in another Python.

    child -> parent   {"description": ..., facts}                     when it is ready, or
                      {"unavailable": "why"}                          and the end
    parent -> child   SECONDS                                         repeat for so long, at least once
    child -> parent   {"calls", "wall", "cpu", "loss", "peak_bytes"}  what it took
    parent -> child   release                                         give freed memory back
    child -> parent   {}
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """What is measured."""

    description: str
    step: Callable[[], float]
    """One meta-step; returns the meta-loss before it."""
    facts: dict[str, Any]
    """What else there is to say."""


def serve(prepare: Callable[[], Candidate]) -> None:
    """Prepare, then answer every line of the standard input, until it ends."""
    answer = answers()
    try:
        candidate = prepare()
    except Exception as error:  # whatever it is, it is why this row of the table is missing
        traceback.print_exc()
        answer(unavailable=reason(error))
        return
    release()
    answer(description=candidate.description, **candidate.facts)
    for line in sys.stdin:
        if line.strip() == "release":
            release()
            answer()
        else:
            answer(**repeat(candidate.step, float(line)))


def answers() -> Callable[..., None]:
    """What sends an answer's fields to the parent; all else that is printed goes to the standard error."""
    # Libraries may print; what they print must not be taken for an answer.
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        stream.write(json.dumps(fields) + "\n")

    return answer


def repeat(step: Callable[[], float], seconds: float) -> dict[str, float]:
    """Do ``step`` for at least so long; ``loss`` is that of its first call."""
    gc.collect()
    before = reset_peak()
    calls, wall, cpu = 1, time.perf_counter(), time.process_time()
    loss = step()
    while time.perf_counter() - wall < seconds:
        step()
        calls += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"calls": calls, "wall": wall, "cpu": cpu, "loss": loss, "peak_bytes": peak() - before}


def pin(threads: int, first: int = 0) -> None:
    """Stay on so many cores, counted from ``first``: not every library keeps to the threads it is told."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[first : first + threads])


def release() -> None:
    """Give freed memory back to the system, so that what is used next counts."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def reset_peak() -> int:
    """Forget the peak of the resident memory where the system can; the memory in use now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS")


def peak() -> int:
    """Highest resident memory since :func:`reset_peak`, or since the start where that cannot be reset."""
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def reason(error: Exception) -> str:
    """An error's first line."""
    lines = str(error).strip().splitlines() or [""]
    return (
        lines[0] if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {lines[0]}"
    )
