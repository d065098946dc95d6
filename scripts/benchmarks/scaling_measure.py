"""One process, two that ignore each other, and two that train the same rule: measured in turn.

All have a core each. Two that ignore each other share the machine's memory and caches as two ranks do, but
nothing else, so that they are what two ranks could reach.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from children import Child
from quiet import Others, Plan, quietest

MODES = ("alone", "both", "ranks")
"""One process, the other core idle; two processes that ignore each other; two ranks."""
_REDUCTIONS = 50
_ROUNDS_OF_REDUCTIONS = 5


class Round(NamedTuple):
    """What was measured in one round of a mode."""

    steps: int
    """Meta-steps that each process made."""
    processes: list[dict[str, float]]
    """The answers, see :mod:`scaling_worker`."""

    def seconds(self, what: str) -> float:
        """Of a meta-step, the mean of the processes."""
        return sum(own[what] for own in self.processes) / len(self.processes) / self.steps

    @property
    def between(self) -> float:
        """Seconds that Lightning takes between two meta-steps."""
        parts = ("drawing", "forward", "backward", "rest")
        return self.seconds("wall") - sum(self.seconds(part) for part in parts)

    @property
    def steps_per_second(self) -> float:
        """Meta-steps of all processes together."""
        return sum(self.steps / own["wall"] for own in self.processes)


class Triple(NamedTuple):
    """One round of every mode, one after the other."""

    alone: Round
    both: Round
    ranks: Round
    others: float
    """Cores that other programs were busy on."""


class Scaling(NamedTuple):
    """All that was measured of a workload."""

    facts: dict[str, Any]
    """What a worker says of itself."""
    triples: list[Triple]
    """The quietest."""
    reductions: list[float]
    """Seconds of the all-reduce alone, with two ranks."""


def measure(name: str, plan: Plan, seconds: float, tick: Callable[[], None]) -> Scaling:
    """Measure a workload.

    Args:
        name: of the workload.
        plan: how often.
        seconds: shortest round of a mode.
        tick: told of every round, and of the start.

    Raises:
        UnavailableError: if a process dies.
    """
    with processes(name) as (loners, ranks):
        facts, *_ = [child.ready() for child in (*loners, *ranks)]
        steps = choose_steps(together(loners, "steps 1"), seconds)
        together(ranks, "steps 1")
        tick()
        turns = itertools.cycle(loners)  # cores differ, if only in who else is on them

        def triple(_: str) -> Triple:
            others, groups = Others(), ([next(turns)], loners, ranks)
            rounds = [Round(steps, together(group, f"steps {steps}")) for group in groups]
            return Triple(*rounds, others.cores())

        found = quietest([name], plan, triple, tick)[name]
        asked = [together(ranks, f"reduce {_REDUCTIONS}") for _ in range(_ROUNDS_OF_REDUCTIONS)]
        for child in (*loners, *ranks):
            child.send("end")
    return Scaling(facts, found, [max(own["seconds"] for own in answers) for answers in asked])


def choose_steps(first: list[dict[str, float]], seconds: float) -> int:
    """Meta-steps that take at least so long."""
    return max(1, math.ceil(seconds / max(own["wall"] for own in first)))


def together(children: list[Child], line: str) -> list[dict[str, float]]:
    """Have all do something at once."""
    for child in children:
        child.send(line)
    return [child.receive() for child in children]


@contextmanager
def processes(name: str) -> Iterator[tuple[list[Child], list[Child]]]:
    """Two processes that ignore each other, and two ranks, one of each on both cores."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    children: list[Child] = []
    try:
        children += [start(name, world=1, core=core, environment={}) for core in range(2)]
        children += [
            start(name, world=2, core=rank, environment={**port, **loopback, "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        yield children[:2], children[2:]
    finally:
        for child in children:
            child.close()


def start(name: str, world: int, core: int, environment: dict[str, str]) -> Child:
    """Start a process."""
    script = str(Path(__file__).parent / "scaling_worker.py")
    options = ["--workload", name, "--world", str(world), "--core", str(core)]
    return Child([sys.executable, script, *options], {"OMP_NUM_THREADS": "1", **environment})


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def has_two_cores() -> bool:
    """Whether there is anything to measure."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return (len(affinity(0)) if affinity else os.cpu_count() or 1) > 1
