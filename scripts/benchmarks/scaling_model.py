"""What meta-training on many GPUs would come to, by arithmetic: pure functions, nothing is measured here.

A rank computes its slots' window, then all ranks sum φ's gradient (an all-reduce), then each makes the same
meta-step, and Lightning tells all whether rank 0 was asked to end (a broadcast of one number). So time per
meta-step = computing · straggling + host's overhead + all-reduce + broadcast + getting the next window.
Nothing overlaps: φ's gradient is ready only when the window's backward pass is done, and the number is waited
for. A window is drawn in the trainer's process, or fetched from actors on the cores of the GPU's share of the
host, whichever is faster; where cores are too few, drawing sets the pace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

DRAW_MARGIN = 1.1
"""Actors are chosen to draw so many times faster than the trainer consumes."""

_FLAG_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection between two neighbours.

    Args:
        latency: seconds that a message takes, however short.
        bandwidth: bytes per second, each way.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of GPUs; the defaults are assumptions about common hardware.

    Args:
        gpus_per_node: that are joined by ``inside``.
        inside: between the GPUs of a node (NVLink).
        between: between nodes (InfiniBand).
        cores_per_gpu: of the host; one is the trainer's, the others draw.
    """

    gpus_per_node: int = 8
    inside: Link = Link(latency=5e-6, bandwidth=150e9)
    between: Link = Link(latency=10e-6, bandwidth=25e9)
    cores_per_gpu: int = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """A meta-step on one rank.

    Args:
        coordinate_steps: of one slot.
        slots: S of a rank that ``compute`` was taken with.
        compute: seconds for the window of these slots, forward and backward to φ.
        fixed: the part of them that does not fall with fewer slots (launches).
        overhead: seconds of the host for each meta-step (Lightning, Adam).
        phi_bytes: of φ's gradient.
        draw: seconds in which one core draws the window of these slots.
        fetch: seconds of the trainer to get a window that actors have drawn.
        jitter: standard deviation of a rank's time for computing, relative; all wait for the slowest.
    """

    coordinate_steps: float
    slots: float
    compute: float
    fixed: float
    overhead: float
    phi_bytes: float
    draw: float
    fetch: float
    jitter: float = 0.0


class Prediction(NamedTuple):
    """Of a number of GPUs."""

    gpus: int
    slots: float
    """Of each GPU."""
    exchange: float
    """Seconds of the all-reduce and the broadcast."""
    step: float
    """Seconds of a meta-step."""
    rate: float
    """Coordinate-steps per second of all GPUs."""
    efficiency: float
    """Of as many times what one GPU does, with as many slots in all (strong) or on each (weak)."""
    actors: int
    """That each GPU needs; 0 where windows are drawn in the trainer's process."""
    drawing_limits: bool
    """Whether its cores are too few for them."""


def ring(count: int, size: float, link: Link) -> float:
    """Seconds of a ring all-reduce of ``size`` bytes: 2(n − 1) messages of a share of them."""
    return 2 * (count - 1) * (link.latency + size / count / link.bandwidth) if count > 1 else 0.0


def tree(count: int, size: float, link: Link) -> float:
    """Seconds of a binary tree, up and down: 2⌈log₂ n⌉ messages of everything."""
    return 2 * math.ceil(math.log2(count)) * (link.latency + size / link.bandwidth) if count > 1 else 0.0


def all_reduce(gpus: int, size: float, cluster: Cluster) -> float:
    """Seconds, first in the nodes and then between them, each the faster way."""
    inside, nodes = min(gpus, cluster.gpus_per_node), math.ceil(gpus / cluster.gpus_per_node)
    ways = [(inside, cluster.inside), (nodes, cluster.between)]
    return sum(min(ring(count, size, link), tree(count, size, link)) for count, link in ways)


def broadcast(gpus: int, size: float, cluster: Cluster) -> float:
    """Seconds, by trees between and in the nodes: half of what they take up and down."""
    inside, nodes = min(gpus, cluster.gpus_per_node), math.ceil(gpus / cluster.gpus_per_node)
    return (tree(inside, size, cluster.inside) + tree(nodes, size, cluster.between)) / 2


def straggling(gpus: int, jitter: float) -> float:
    """How many times longer than a typical rank the slowest takes: 1 + σ √(2 ln n), for normal times."""
    return 1 + jitter * math.sqrt(2 * math.log(gpus))


def predict(work: Work, cluster: Cluster, gpus: int, slots: float) -> Prediction:
    """A meta-step of so many GPUs with so many slots on each."""
    share = slots / work.slots
    compute = min(work.fixed, work.compute) + max(work.compute - work.fixed, 0) * share
    exchange = all_reduce(gpus, work.phi_bytes, cluster) + broadcast(gpus, _FLAG_BYTES, cluster)
    rest = compute * straggling(gpus, work.jitter) + work.overhead + exchange
    step, actors, limited = drawing(work, rest, work.draw * share, cluster.cores_per_gpu - 1)
    rate = gpus * slots * work.coordinate_steps / step
    return Prediction(gpus, slots, exchange, step, rate, math.nan, actors, limited)


def drawing(work: Work, rest: float, draw: float, cores: int) -> tuple[float, int, bool]:
    """Time of a meta-step, actors, and whether cores are too few.

    Args:
        work: says what it takes to fetch a window.
        rest: seconds of a meta-step without getting its window.
        draw: seconds in which one core draws it.
        cores: for actors.
    """
    here, ahead = rest + draw, rest + work.fetch
    actors = math.ceil(DRAW_MARGIN * draw / ahead)
    limited = actors > cores
    if limited:
        ahead = max(ahead, draw / cores) if cores else math.inf
    return (here, 0, False) if here <= ahead else (ahead, actors, limited)


def weak(work: Work, cluster: Cluster, gpus: list[int]) -> list[Prediction]:
    """As many slots on every GPU, however many GPUs."""
    one = predict(work, cluster, 1, work.slots).rate
    found = [predict(work, cluster, count, work.slots) for count in gpus]
    return [each._replace(efficiency=each.rate / (each.gpus * one)) for each in found]


def strong(work: Work, cluster: Cluster, gpus: list[int], total: int) -> list[Prediction]:
    """As many slots in all; GPUs beyond one for each slot have nothing to do, and are left out."""
    one = predict(work, cluster, 1, total).rate
    found = [predict(work, cluster, count, total / count) for count in gpus if count <= total]
    return [each._replace(efficiency=each.rate / (each.gpus * one)) for each in found]
