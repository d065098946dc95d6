"""Keeps other programs out of what is measured: rounds that they disturb are repeated; the quietest count."""

from __future__ import annotations

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
    tries: int
    """Rounds at most."""
    patience: float
    """Seconds to wait before rounds, all together, until others are quiet."""

    @classmethod
    def of(cls, args: Namespace) -> Plan:
        """What the command line asks for."""
        return cls(args.rounds, args.tries or 3 * args.rounds, args.patience)


def add_arguments(parser: ArgumentParser, rounds: int) -> None:
    """Add what :meth:`Plan.of` reads."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="that count, of every way (default: %(default)s)")
    tries_help = "rounds at most, while other programs disturb; the quietest count (default: 3 × --rounds)"
    add("--tries", type=int, help=tries_help)
    patience_help = "seconds to wait until they are quiet, all together (default: %(default)s)"
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
    for number in range(max(plan.tries, plan.rounds)):
        for way, own in found.items():
            if sum(one.others < QUIET for one in own) >= plan.rounds:
                continue
            patience -= wait(patience)
            own.append(measure(way))
            if number < plan.rounds:
                tick()
    return {way: sorted(own, key=_others)[: plan.rounds] for way, own in found.items()}


def _others(one: Disturbed) -> float:
    return one.others


def most(rounds: Iterable[Disturbed]) -> float:
    """Cores that others were busy on in the least quiet round."""
    return max(map(_others, rounds))


def wait(patience: float) -> float:
    """Wait until others are quiet, but no longer than so many seconds; how long that took."""
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < patience:
        before = busy()
        time.sleep(_LOOK)
        if busy() - before < QUIET * _LOOK:
            break
    return waited


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
