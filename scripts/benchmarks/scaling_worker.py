"""One rank of a run under Lightning, on a core of its own, that stops between meta-steps to be asked.

child -> parent   {"workload": ..., "phi_bytes": ...}     when the first meta-steps are done, or
                  {"unavailable": "why"}                   and the end
parent -> child   steps N                                  make so many meta-steps
child -> parent   {"steps", "wall", "cpu", and the parts}  seconds of all of them together
parent -> child   reduce N                                 all ranks: sum vectors like φ's gradient
child -> parent   {"seconds": ...}                         of one
parent -> child   end
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import worker
import workloads
from lightning.pytorch.callbacks import Callback

from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.training import MetaTraining
from l2l_scale.training.data import WindowData

_WARM_UP = 2
PARTS = ("drawing", "forward", "backward", "rest")
"""Of a meta-step. backward: to φ, with the exchange of φ's gradient between ranks; rest: Adam, and Lightning
in it. What Lightning does between meta-steps is what is missing to the whole."""


def main() -> None:
    """Read the command line, and train until the parent says so."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--core", type=int, required=True)
    args = parser.parse_args()
    answer = worker.answers()
    worker.pin(1, args.core)
    torch.set_num_threads(1)
    try:
        train(args.workload, args.world, answer)
    except (ValueError, RuntimeError, OSError) as error:
        answer(unavailable=worker.reason(error))


def train(name: str, world: int, answer: Callable[..., None]) -> None:
    """Meta-train with as many slots on every rank as the workload has."""
    for source in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(source).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    workload = workloads.make(name)
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM()
    module = MetaTraining(rule, workload.family, final_fraction=1)
    window, horizon = workloads.SCHEDULE.window, workloads.SCHEDULE.horizon
    data = WindowData(
        workload.family,
        slots=workload.slots * world,
        window=window,
        horizon=horizon,
        windows_per_epoch=10**9,
    )
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[Conversation(workload.description, answer)],
        **quiet,
    )
    trainer.fit(module, datamodule=data)


class Conversation(Callback):
    """Answers between meta-steps.

    Args:
        workload: in words.
        answer: sends an answer's fields.
    """

    def __init__(self, workload: str, answer: Callable[..., None]) -> None:
        self.workload, self.answer = workload, answer
        self.steps = self.left = _WARM_UP
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.start = self.start_cpu = self.mark = self.waited = 0.0
        self.is_warm = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before a meta-step: the place to speak."""
        if self.left == 0:
            self._report(trainer, pl_module)
            self._listen(trainer, pl_module)
            self.seconds = dict.fromkeys(PARTS, 0.0)
            self.waited = trainer.train_dataloader.waited
            self.start, self.start_cpu = time.perf_counter(), time.process_time()
        self.left -= 1
        self.mark = time.perf_counter()

    def _report(self, trainer: Any, module: Any) -> None:
        wall, cpu = time.perf_counter() - self.start, time.process_time() - self.start_cpu
        self.seconds["drawing"] = trainer.train_dataloader.waited - self.waited
        if self.is_warm:
            self.answer(steps=self.steps, wall=wall, cpu=cpu, **self.seconds)
            return
        self.is_warm = True
        phi_bytes = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        description = module.accelerated[""].description
        self.answer(workload=self.workload, phi_bytes=phi_bytes, backend=description)

    def _listen(self, trainer: Any, module: Any) -> None:
        """Do what the parent says, until it says that meta-steps are to be made."""
        for line in iter(sys.stdin.readline, ""):
            what, _, number = line.strip().partition(" ")
            if what == "reduce":
                self.answer(seconds=all_reduce_seconds(module, int(number)))
            elif what == "steps":
                self.steps = self.left = int(number)
                return
            else:
                break
        trainer.should_stop, self.left = True, 1  # the last one, and on all ranks

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The forward part is done."""
        self._lap("forward")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The gradient of φ is there, and the same on all ranks."""
        self._lap("backward")

    def on_train_batch_end(self, *_: Any) -> None:
        """The meta-step is done."""
        self._lap("rest")

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self.mark
        self.mark = now


def all_reduce_seconds(module: Any, count: int) -> float:
    """Collective. Seconds to sum a vector of φ's size over the ranks, a mean of so many in a row."""
    flat = torch.zeros(sum(p.numel() for p in module.parameters() if p.requires_grad))
    dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        dist.all_reduce(flat)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
