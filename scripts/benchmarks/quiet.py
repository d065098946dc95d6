"""Keeps other programs out of what is measured: rounds that they disturb are repeated; the quietest count."""

from __future__ import annotations

import itertools
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import psutil

QUIET = 0.1
"""Cores that others may be busy on in a quiet round."""
_LOOK = 0.5  # seconds, to see whether they are


class Disturbed(Protocol):
    """What a round brought."""

    @property
    def others(self) -> float:
        """Cores that other programs were busy on."""


Way = TypeVar("Way")
Round = TypeVar("Round", bound=Disturbed)


class Plan(NamedTuple):
    """How often to measure."""

    rounds: int
    """That count, of every way."""
    patience: float
    """Seconds to spend on waiting until others are quiet, and on repeating what they disturbed."""

    @classmethod
    def of(cls, args: Namespace) -> Plan:
        """What the command line asks for."""
        return cls(args.rounds, args.patience)


def add_arguments(parser: ArgumentParser, rounds: int) -> None:
    """Add what :meth:`Plan.of` reads."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="that count, of every way (default: %(default)s)")
    patience_help = (
        "seconds to spend, for each workload, on waiting until other programs are quiet and on repeating "
        "rounds that they disturbed; the quietest rounds count (default: %(default)g)"
    )
    add("--patience", type=float, default=60.0, help=patience_help)


def quietest(
    ways: Iterable[Way], plan: Plan, measure: Callable[[Way], Round], tick: Callable[[], None]
) -> dict[Way, list[Round]]:
    """Measure in rounds that are interleaved; the quietest of every way.

    Args:
        ways: what to measure.
        plan: how often.
        measure: one round.
        tick: told of the first ``plan.rounds`` rounds of every way.
    """
    found: dict[Way, list[Round]] = {way: [] for way in ways}
    patience = plan.patience
    for number in itertools.count():
        for way, own in _unfinished(found, plan.rounds):
            is_repeat = number >= plan.rounds
            if is_repeat and patience <= 0:
                return _chosen(found, plan.rounds)
            start = time.perf_counter()
            wait(patience)
            waited = time.perf_counter() - start
            own.append(measure(way))
            patience -= time.perf_counter() - start if is_repeat else waited
            if not is_repeat:
                tick()
        if not _unfinished(found, plan.rounds):
            break
    return _chosen(found, plan.rounds)


def _unfinished(found: dict[Way, list[Round]], rounds: int) -> list[tuple[Way, list[Round]]]:
    """Ways without so many quiet rounds."""
    return [pair for pair in found.items() if sum(one.others < QUIET for one in pair[1]) < rounds]


def _chosen(found: dict[Way, list[Round]], rounds: int) -> dict[Way, list[Round]]:
    return {way: sorted(own, key=_others)[:rounds] for way, own in found.items()}


def _others(one: Disturbed) -> float:
    return one.others


def most(rounds: Iterable[Disturbed]) -> float:
    """Cores that others were busy on in the least quiet round."""
    return max(map(_others, rounds))


def wait(patience: float) -> None:
    """Wait until others are quiet, but no longer than so many seconds."""
    end = time.perf_counter() + patience
    while time.perf_counter() < end:
        before = busy()
        time.sleep(_LOOK)
        if busy() - before < QUIET * _LOOK:
            break


class Others:
    """Watches from now on how busy other programs are."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), busy() - ours()

    def cores(self) -> float:
        """How many cores they were busy on; 0 where the system does not say."""
        start, before = self.start
        return max(0.0, (busy() - ours() - before) / (time.perf_counter() - start))


def busy() -> float:
    """CPU seconds of all programs since the machine started."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def ours() -> float:
    """CPU seconds of this process and those that it started, of all that live."""
    if sys.platform != "linux":
        return 0.0
    own = psutil.Process()
    return sum(map(_cpu, [own, *own.children(recursive=True)]))


def _cpu(process: Any) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
