"""Ray actors that draw windows ahead of the trainer. The only file that imports ray.

An actor runs the same pure sampler that runs in the trainer's process without a pool. So neither the number
of actors nor their deaths change a bit of the stream: an actor that dies is started again, and draws again.

Importing this file imports ray, which reads its environment then: call
:meth:`~l2l_scale.sampling.PoolSettings.prepare_environment` before.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from l2l_scale.cores import available_cores
from l2l_scale.sampling.seats import Pieces, RankSampler
from l2l_scale.sampling.settings import PoolSettings

_ANSWER = 30
"""Seconds that a cluster may take to answer."""
_START = 180
"""Seconds that actors may take to start: they import torch, all at once."""
_LAST_WORDS = 2
"""Seconds that actors have to finish what was ordered."""
_PATIENCE = 600
"""Seconds that a window may take: far more than a restart of all actors."""


class RayNode(NamedTuple):
    """Where a node's Ray is, and what opens it."""

    address: str
    token: str | None


def start_ray() -> RayNode:
    """Start a Ray of this node's own; it ends with this process. Other ranks :func:`join_ray` it."""
    os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    with _our_signals():
        ray.init(
            address="local",  # else it would join a cluster that happens to run on this machine, or refuse
            num_cpus=available_cores(),
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    return RayNode(str(ray.get_runtime_context().gcs_address), os.environ.get("RAY_AUTH_TOKEN"))


def join_ray(node: RayNode) -> None:
    """Connect to a Ray that runs already.

    Raises:
        ValueError: if it does not answer.
    """
    if node.token is not None:
        os.environ["RAY_AUTH_TOKEN"] = node.token
    with _our_signals():
        ray.init(address=node.address, log_to_driver=False, logging_level=logging.ERROR)


def stop_ray() -> None:
    """Disconnect; what :func:`start_ray` started ends."""
    with _our_signals():
        ray.shutdown()


def check_cluster(address: str) -> None:
    """Ask a cluster whether it is there: ``ray.init`` would wait for minutes and then end this process.

    Raises:
        ValueError: if it does not answer.
    """
    host, _, port = address.rpartition(":")
    advice = "start one by `ray start --head`, or leave ray_address out: then every node starts its own"
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
        code = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False)"
        asked = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=_ANSWER
        )
        failure = "" if asked.returncode == 0 else (asked.stderr.strip().splitlines() or ["no reason"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = "no answer" if isinstance(error, subprocess.TimeoutExpired) else str(error)
    if failure:
        raise ValueError(f"ray_address ({address}): there is no Ray cluster ({failure}); {advice}")


@contextmanager
def _our_signals() -> Iterator[None]:
    """Keep this process's handlers, which Ray would replace, and shield Ray's processes from SIGUSR1.

    They inherit that it is ignored; SLURM sends it to all processes of a job to say that time is running out.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Actor:
    """Draws its part of the slots. It has no state: whatever it knew it can draw again.

    Args:
        path: where the trainer's process finds modules; Ray tells its processes a part of that only.
        sampler: pickled, for it may need these modules.
    """

    def __init__(self, path: list[str], sampler: bytes) -> None:
        import torch

        torch.set_num_threads(1)
        sys.path.extend(entry for entry in path if entry not in sys.path)
        self.sampler: RankSampler = cloudpickle.loads(sampler)

    def draw(self, index: int) -> Pieces:
        """The window with this index, in single precision."""
        return [[window.single() for window in drawn] for drawn in self.sampler(index)]

    def process(self) -> int:
        """Its process."""
        return os.getpid()


class SamplerPool:
    """Draws the windows of a rank in Ray actors, in order, at most ``depth`` ahead.

    A drop-in for the :class:`RankSampler` that it is given. Slots are dealt out over the actors, so that what
    is expensive about a task is done once; where there are more actors than slots, several take turns.
    Arrays come through Ray's object store: they are views of memory that actors wrote.

    Args:
        sampler: what the actors run.
        settings: how many they are. Ray must have been started or joined.
        pools: how many pools share the CPUs: one for each rank of the node.

    Raises:
        ValueError: if the actors do not fit on the CPUs that Ray has.
        RuntimeError: if they do not start.
    """

    def __init__(self, sampler: RankSampler, settings: PoolSettings, pools: int = 1) -> None:
        cpus = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        settings.check_cpus(pools, cpus, "that Ray has")
        parts = max(n for n in range(1, settings.num_actors + 1) if _deals(n, settings, sampler))
        remote = ray.remote(
            num_cpus=settings.cpus_per_actor, max_restarts=-1, max_task_retries=-1, num_gpus=0
        )(_Actor)
        shares = [
            cloudpickle.dumps(sampler.part(number, parts))  # type: ignore[no-untyped-call]
            for number in range(parts)
        ]
        self.actors: list[Any] = [
            remote.remote(sys.path, shares[number % parts]) for number in range(settings.num_actors)
        ]
        self.parts, self.depth = parts, settings.depth
        self.in_flight: deque[tuple[int, list[ray.ObjectRef[Any]]]] = deque()
        try:
            ray.get([actor.process.remote() for actor in self.actors], timeout=_START)
        except RayError as error:
            raise RuntimeError(f"the {settings.num_actors} sampling actors did not start: {error}") from error

    def __call__(self, index: int) -> Pieces:
        """Window ``index``. The next ones are ordered; a jump throws away what was ordered before."""
        if not self.in_flight or self.in_flight[0][0] != index:
            self.in_flight.clear()
        self._fill(index)
        _, references = self.in_flight.popleft()
        try:
            drawn: list[Pieces] = ray.get(references, timeout=_PATIENCE)
        except RayTaskError as error:  # an exception of the sampler's own
            raise RuntimeError(f"window {index} could not be drawn: {error.cause!r}") from error
        except GetTimeoutError as error:
            raise RuntimeError(f"window {index} was not drawn within {_PATIENCE} seconds") from error
        except RayActorError as error:
            raise RuntimeError(f"the sampling actors are gone for good: {error}") from error
        self._fill(index + 1)
        return [[piece for pieces in seat for piece in pieces] for seat in zip(*drawn, strict=True)]

    def _fill(self, index: int) -> None:
        """Order what is not yet in flight of the ``depth`` windows from ``index`` on."""
        first = self.in_flight[-1][0] + 1 if self.in_flight else index
        for ahead in range(first, index + self.depth):
            self.in_flight.append((ahead, self._order(ahead)))

    def _order(self, index: int) -> list[ray.ObjectRef[Any]]:
        """Have all parts of a window drawn. The actors of one part take turns."""
        turn = self.parts * (index % (len(self.actors) // self.parts))
        return [actor.draw.remote(index) for actor in self.actors[turn : turn + self.parts]]

    def processes(self) -> list[int]:
        """The actors' processes."""
        numbers: list[int] = ray.get([actor.process.remote() for actor in self.actors])
        return numbers

    def close(self) -> None:
        """Let the actors end: they do when nobody holds them and they have drawn what was ordered."""
        ordered = [reference for _, references in self.in_flight for reference in references]
        if ordered:  # else Ray complains of tasks that nobody does any more
            ray.wait(ordered, num_returns=len(ordered), timeout=_LAST_WORDS)
        self.in_flight.clear()
        self.actors = []


def _deals(parts: int, settings: PoolSettings, sampler: RankSampler) -> bool:
    """Whether the slots can be dealt out over so many parts, with as many actors for each."""
    return settings.num_actors % parts == 0 and parts <= sampler.max_slots
