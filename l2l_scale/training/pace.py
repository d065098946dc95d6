"""Says how fast windows are drawn and trained on, and how many sampling actors would pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from l2l_scale.cores import available_cores
from l2l_scale.sampling import to_batch
from l2l_scale.training.data import WindowData
from l2l_scale.training.module import MetaTraining

WORTH_SHARE = 0.05
"""Drawing that takes a smaller share of the time than this is not worth an actor."""
WORTH_SECONDS = 2e-3
"""Nor is a window that is drawn faster: asking for it and fetching it takes about as long (measured)."""
_LONG = 5.0
"""Seconds from which on the first, slower time of something is good enough."""


class Pace(NamedTuple):
    """Seconds per window on one rank."""

    draw: float
    """To draw it in one process."""
    train: float
    """To compute it, the meta-gradient included."""


class PaceReport(Callback):
    """Measures some windows before training starts, without a trace, and says what that means for actors."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """On all ranks at once, as they will run; rank 0 speaks."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, WindowData) or not isinstance(pl_module, MetaTraining):
            return
        pace = measure(pl_module, data, trainer)
        if trainer.is_global_zero:
            print(report(pace, data.pool.num_actors, trainer.num_devices, available_cores()), flush=True)


def measure(module: MetaTraining, data: WindowData, trainer: L.Trainer) -> Pace:
    """Draw and compute the run's next windows."""
    seats = data.seats(trainer.global_rank, trainer.world_size)
    sampler, start = data.sampler(seats), module.next_window
    began = time.perf_counter()
    first = sampler(start)  # draws all slots' tasks; later ones only those that begin
    draw = time.perf_counter() - began
    if draw < _LONG:
        draw = median_seconds(lambda index: to_batch(seats, sampler(start + 1 + index)), 3)
    batch = trainer.strategy.batch_to_device(to_batch(seats, first))

    def train(_: int) -> None:
        module.rehearse(batch)
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)

    return Pace(draw, median_seconds(train, 2))


def median_seconds(work: Callable[[int], object], rounds: int) -> float:
    """The lower median of some rounds after a first one; that one's time if it is long."""
    seconds = []
    for index in range(rounds + 1):
        start = time.perf_counter()
        work(index)
        seconds.append(time.perf_counter() - start)
        if seconds[0] > _LONG:
            return seconds[0]
    return sorted(seconds[1:])[(rounds - 1) // 2]


def recommend(pace: Pace, ranks: int, cpus: int) -> int:
    """How many actors a rank should have: as many as keep up with it, and leave each rank a core.

    Args:
        pace: of a rank.
        ranks: on this node.
        cpus: of this node.
    """
    if pace.draw < max(WORTH_SECONDS, WORTH_SHARE * pace.train):
        return 0
    return min(math.ceil(1.1 * pace.draw / pace.train), max(cpus // ranks - 1, 0))


def report(pace: Pace, num_actors: int, ranks: int, cpus: int) -> str:
    """The measured pace, and what to do."""
    best = recommend(pace, ranks, cpus)
    share = pace.draw / (pace.draw + pace.train)
    where = f"{num_actors} actor(s) draw ahead" if num_actors else f"{share:.0%} of the time in this process"
    if best == num_actors:
        advice = "as recommended"
    elif best == 0:
        advice = "recommended: --data.pool.num_actors 0, in the trainer's process"
        if pace.draw >= max(WORTH_SECONDS, WORTH_SHARE * pace.train):
            advice += " (there is no spare core)"
    else:
        advice = f"recommended: --data.pool.num_actors {best}"
    return (
        f"a process draws {_rate(pace.draw)} windows/s, the trainer consumes {_rate(pace.train)}: {where}; "
        f"{advice}"
    )


def _rate(seconds: float) -> str:
    rate = 1 / max(seconds, 1e-9)
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
