"""Ways of drawing windows: in this process, or by pools of Ray actors that all live in one Ray."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from quiet import Others

from l2l_scale.cores import available_cores
from l2l_scale.sampling import Batch, PoolSettings, WindowLoader
from l2l_scale.training.data import WindowData
from l2l_scale.tree import tree_leaves


class Entrant(NamedTuple):
    """A number of actors, and how many windows they draw ahead."""

    actors: int
    depth: int

    @property
    def label(self) -> str:
        """For the table."""
        if self.actors == 0:
            return "in process"
        return f"{self.actors} actor{'s' * (self.actors > 1)}, depth {self.depth}"


class Drawn(NamedTuple):
    """What one round brought."""

    windows: int
    wall: float
    """Seconds for all of them."""
    own_cpu: float
    """CPU seconds of this process, all threads, for all of them."""
    cpu_per_window: float
    """CPU seconds of this process and the actors for one window."""
    others: float
    """Cores that other programs were busy on."""


class Source:
    """An endless stream of batches, as the trainer gets them. Must be closed.

    Args:
        data: what is drawn.
        entrant: how.
        share: CPUs that an actor counts for in Ray's books.
        epoch: windows of an epoch.
    """

    def __init__(self, data: WindowData, entrant: Entrant, share: float = 0.5, epoch: int = 2**40) -> None:
        seats = data.seats(0, 1)
        sampler = data.sampler(seats)
        self.pool = None
        if entrant.actors:
            from l2l_scale.sampling.pool import SamplerPool

            settings = PoolSettings(num_actors=entrant.actors, depth=entrant.depth, cpus_per_actor=share)
            self.pool = SamplerPool(sampler, settings)
        self.depth = entrant.depth
        self.loader = WindowLoader(self.pool or sampler, seats, epoch)

    def first(self) -> Batch:
        """Draw the first window, with the tasks of all slots; later ones draw those that begin."""
        batch = next(iter(self.loader))
        self.drain()
        return batch

    def round(self, seconds: float) -> Drawn:
        """Draw for at least so long. A window before that fills the queue, and does not count."""
        windows, before, asked = iter(self.loader), self._actors_cpu(), self.loader.next_index
        next(windows)
        others = Others()
        count, wall, cpu = 0, time.perf_counter(), time.process_time()
        while count == 0 or time.perf_counter() - wall < seconds:
            next(windows)
            count += 1
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        disturbed = others.cores()
        self.drain()
        of_actors = (self._actors_cpu() - before) / (self.loader.next_index - asked)
        return Drawn(count, wall, cpu, cpu / count + of_actors, disturbed)

    def drain(self) -> None:
        """Fetch what was ordered, so that nothing is drawn while another source is measured."""
        if self.pool is not None:
            self.pool.depth = 0  # then nothing more is ordered
            windows = iter(self.loader)
            while self.pool.in_flight:
                next(windows)
            self.pool.depth = self.depth

    def processes(self) -> list[int]:
        """The actors' processes."""
        return [] if self.pool is None else self.pool.processes()

    def _actors_cpu(self) -> float:
        times = [psutil.Process(number).cpu_times() for number in self.processes()]
        return sum(one.user + one.system for one in times)

    def close(self) -> None:
        """Let the actors end."""
        if self.pool is not None:
            self.pool.close()


@contextmanager
def ray_of_our_own(entrants: list[Entrant]) -> Iterator[float]:
    """Ray, while it is needed; what an actor may count for, in CPUs, so that all entrants' pools fit at once.

    Pools take turns, and one that waits costs nothing.
    """
    total = sum(entrant.actors for entrant in entrants)
    if total == 0:
        yield 1.0
        return
    PoolSettings().prepare_environment()
    from l2l_scale.sampling.pool import start_ray, stop_ray

    start_ray()
    try:
        yield min(1.0, int(1000 * available_cores() / total) / 1000)
    finally:
        stop_ray()


def size_of(batch: Batch) -> int:
    """Bytes of a batch's tensors."""
    leaves = tree_leaves(tuple(tuple(seat.window) for seat in batch))
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def pin_apart(threads: int) -> str:
    """Keep this process on the first cores, and Ray's processes on the others; what was done, in words."""
    if sys.platform != "linux" or available_cores() <= threads:
        return "not pinned"
    cores = sorted(os.sched_getaffinity(0))
    children = psutil.Process().children(recursive=True)
    for process, own in [
        (os.getpid(), cores[:threads]),
        *((child.pid, cores[threads:]) for child in children),
    ]:
        for thread in Path(f"/proc/{process}/task").glob("*"):
            try:
                os.sched_setaffinity(int(thread.name), own)
            except ProcessLookupError:  # it is gone
                continue
    return f"trainer on {threads} core(s), Ray and its actors on the other {len(cores) - threads}"
