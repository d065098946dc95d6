"""Measures all entrants on one workload, in turn, so that a busy machine disturbs all alike."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import sizes
from backends import RULES, Entrant, rule_of
from children import Child, Repetition, UnavailableError, available_bytes

MOST_ROUNDS = 5
_ALLOWANCE = 6.0  # seconds that one entrant's rounds may take on one workload, if no number was given
_LONG = 2.0  # a first meta-step of so many seconds counts as a round: what is slow but once is lost in it
_TOLERANCE, _TOLERANCE_BF16 = 1e-4, 1e-2  # of the first meta-loss, relative


class Summary(NamedTuple):
    """Median, minimum and maximum over the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(kw_only=True)
class Result:
    """What was measured of one entrant on one workload."""

    work: int
    """Coordinate-steps of a meta-step."""
    missing: str | None = None
    """Why there is nothing more."""
    facts: dict[str, Any] = field(default_factory=dict)
    first: Repetition | None = None
    rounds: list[Repetition] = field(default_factory=list)

    @property
    def per_second(self) -> list[float]:
        """Coordinate-steps per second, round by round."""
        return [one.calls * self.work / one.wall for one in self.rounds]

    @property
    def per_cpu_second(self) -> list[float]:
        """Coordinate-steps per CPU second of all threads, round by round."""
        return [one.calls * self.work / one.cpu for one in self.rounds]


Results = dict[Entrant, Result]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    Args:
        rounds: of every entrant; if not given as many as are quick, up to MOST_ROUNDS.
        min_seconds: shortest round.
        deadline: in seconds of ``time.monotonic``; what would end later is left out.
        pace: how many times slower than expected it goes here.
        jax_python: the Python that has JAX.
        folder: for temporary files.
    """

    rounds: int | None
    min_seconds: float
    deadline: float
    pace: float = 1.0
    jax_python: str
    folder: Path

    def rounds_of(self, seconds: float) -> int:
        """Rounds of an entrant whose meta-step takes so long."""
        if self.rounds is not None:
            return self.rounds
        return max(1, min(MOST_ROUNDS, int(_ALLOWANCE / max(seconds, self.min_seconds))))

    def expected(self, entrant: Entrant, workload: str) -> float:
        """Seconds for everything, roughly."""
        step = entrant.seconds(workload)
        rounds = self.rounds_of(step) * max(step, self.min_seconds)
        return entrant.start_seconds(workload) + rounds + (step if step < _LONG else 0)


class Race:
    """One workload. Every entrant has a process of its own, so that its memory is its own.

    Args:
        workload: its name.
        entrants: who.
        settings: how.
        tick: told of every entrant that has its rounds, or will get none.
    """

    def __init__(
        self,
        workload: str,
        entrants: Sequence[Entrant],
        settings: Settings,
        tick: Callable[[Entrant], None],
    ) -> None:
        self.workload, self.settings, self.tick = workload, settings, tick
        work = sizes.coordinate_steps(workload)
        self.results: Results = {entrant: Result(work=work) for entrant in entrants}
        self.children: dict[Entrant, Child] = {}

    def run(self) -> Results:
        """Measure.

        Raises:
            SystemExit: if two start from different meta-losses.
        """
        with ExitStack() as stack:
            self._start(stack)
            for entrant in self._alive():
                with self._may_fail(entrant):
                    self._first(entrant)
            check_agreement(self.results)
            while entrants := [entrant for entrant in self._alive() if self._wants(entrant)]:
                for entrant in entrants:
                    with self._may_fail(entrant):
                        self._round(entrant)
        return self.results

    def _start(self, stack: ExitStack) -> None:
        """Start the children, as many at a time as there are cores, and wait until all are ready."""
        jax = any(entrant.is_jax for entrant in self.results)
        problem = self._export() if jax else self.settings.folder
        waiting: list[Entrant] = []
        for entrant in self.results:
            with self._may_fail(entrant):
                self._check_memory(entrant)
                self._check_time(entrant, entrant.start_seconds(self.workload))
                command = entrant.command(self.workload, self.settings.jax_python, problem)
                child = Child(command)
                stack.callback(child.close)
                self.children[entrant] = child
                waiting.append(entrant)
            if len(waiting) >= (os.cpu_count() or 1):
                self._wait(waiting.pop(0))
        for entrant in waiting:
            self._wait(entrant)

    def _export(self) -> Path:
        from export import export  # needs PyTorch, which takes seconds to import

        return export(self.workload, self.settings.folder)

    def _wait(self, entrant: Entrant) -> None:
        with self._may_fail(entrant):
            self.results[entrant].facts = self.children[entrant].ready()

    def _alive(self) -> list[Entrant]:
        return [entrant for entrant, result in self.results.items() if result.missing is None]

    def _wants(self, entrant: Entrant) -> bool:
        result = self.results[entrant]
        assert result.first is not None
        done = len(result.rounds) >= self.settings.rounds_of(result.first.wall)
        return not done and (not result.rounds or time.monotonic() < self.settings.deadline)

    def _first(self, entrant: Entrant) -> None:
        """The first meta-step, which shows the memory."""
        self._check_time(entrant, 0.0)
        self._make_room(entrant)
        result = self.results[entrant]
        result.first = self.children[entrant].repeat(0)
        if result.first.wall >= _LONG:
            result.rounds.append(result.first)
        if not self._wants(entrant):
            self.tick(entrant)

    def _round(self, entrant: Entrant) -> None:
        self._make_room(entrant)
        repetition = self.children[entrant].repeat(self.settings.min_seconds)
        self.results[entrant].rounds.append(repetition)
        if not self._wants(entrant):
            self.tick(entrant)

    def _check_memory(self, entrant: Entrant) -> None:
        needed, free = entrant.bytes(self.workload), available_bytes()
        if needed > free:
            raise UnavailableError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")

    def _check_time(self, entrant: Entrant, start: float) -> None:
        left = self.settings.deadline - time.monotonic()
        expected = self.settings.pace * (start + entrant.seconds(self.workload))
        if expected > left:
            raise UnavailableError(
                f"takes about {expected:.0f} s, {max(left, 0):.0f} s are left of --minutes"
            )

    def _make_room(self, entrant: Entrant) -> None:
        """Freed memory stays with a process, and is fast to use again; it is taken away only if needed."""
        if entrant.bytes(self.workload) > available_bytes():
            for other in self._alive():
                self.children[other].release()
            self._check_memory(entrant)

    @contextmanager
    def _may_fail(self, entrant: Entrant) -> Iterator[None]:
        """What goes wrong in here is the reason why the entrant's result is missing."""
        try:
            yield
        except UnavailableError as error:
            self.results[entrant].missing = str(error)
            self.tick(entrant)


def check_agreement(results: Results) -> None:
    """All that compute one rule must start from the same meta-loss, else they are no peers.

    Raises:
        SystemExit: with all meta-losses, if not.
    """
    started = {entrant: result.first.loss for entrant, result in results.items() if result.first is not None}
    for rule in ("lstm", *RULES):
        losses = {entrant: loss for entrant, loss in started.items() if rule_of(entrant.backend) == rule}
        middle = statistics.median_low(losses.values()) if losses else 0.0
        for entrant, loss in losses.items():
            tolerance = _TOLERANCE_BF16 if "bf16" in entrant.backend else _TOLERANCE
            if not math.isclose(loss, middle, rel_tol=tolerance):
                values = ", ".join(f"{other.label}: {value:.8g}" for other, value in losses.items())
                raise SystemExit(
                    f"error: the backends start from different meta-losses, so no peers: {values}"
                )
