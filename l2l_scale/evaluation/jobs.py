"""Independent pieces of work, spread over processes, with a progress bar that shows the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from joblib import Parallel, delayed
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from l2l_scale.cores import one_thread


class Job(NamedTuple):
    """One piece of work; picklable, and a pure function of what it holds."""

    cost: float
    """About how long it takes, in any unit: for the order and the progress bar only."""
    call: Callable[[], Any]


@dataclass
class Runner:
    """Runs jobs and counts their time.

    Args:
        num_workers: processes; 1 is this process.
        progress: shows how far it is, or None.
    """

    num_workers: int
    progress: Progress | None = None
    cpu_seconds: float = 0.0
    """CPU time of the jobs so far, over all processes."""

    def run(self, description: str, jobs: Sequence[Job]) -> list[Any]:
        """Results in the order of the jobs. The longest start first, so that none is waited for."""
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i].cost)
        results: dict[int, Any] = {}
        pool = Parallel(n_jobs=self.num_workers, return_as="generator_unordered", batch_size=1)
        with self._bar(description, sum(job.cost for job in jobs)) as advance:
            for i, result, seconds in pool(delayed(_timed)(i, jobs[i].call) for i in order):
                results[i] = result
                self.cpu_seconds += seconds
                advance(jobs[i].cost)
        return [results[i] for i in range(len(jobs))]

    @contextmanager
    def _bar(self, description: str, total: float) -> Iterator[Callable[[float], None]]:
        """A line of the progress display; gives the function that moves it."""
        if self.progress is None:
            yield lambda amount: None
            return
        bar = self.progress.add_task(description, total=total)
        yield lambda amount: self.progress.advance(bar, amount)  # type: ignore[union-attr]


def _timed(i: int, call: Callable[[], Any]) -> tuple[int, Any, float]:
    """Number, result and CPU time of a job. One thread per process: more only get in each other's way."""
    start = time.process_time()
    with one_thread():
        result = call()
    return i, result, time.process_time() - start


def progress_display() -> Progress:
    """A progress display for the terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
