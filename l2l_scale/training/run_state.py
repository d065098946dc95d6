"""Keeps ``run.json`` in the run folder: how the run is, for ``l2l-scale runs`` and for people."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any

import lightning as L
import psutil
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from l2l_scale.files import write_atomically
from l2l_scale.run_record import HEARTBEAT, RUN_FILE, Best, RunRecord, State, now, read_record
from l2l_scale.training.preemption import Stopped
from l2l_scale.training.slurm_job import SlurmJob


class RunStateFile(Callback):
    """Writes ``run.json`` (see :class:`~l2l_scale.run_record.RunRecord`) on rank 0.

    It is written when training starts, after each validation, every 30 s in between, and when training ends
    or fails. A run is "finished" only when :meth:`end` says so: the rule is exported after training. What
    fails there, outside of Lightning, is recorded too if it happens in a ``with`` block of this object.

    A file that cannot be written is said once and does not end the training.

    Args:
        folder: the run folder.
        monitor: the metric of which the best value is kept; None keeps none.
        mode: "min" or "max", what is best.
    """

    def __init__(self, folder: Path, monitor: str | None, mode: str = "min") -> None:
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self.record: RunRecord | None = None
        """Only on rank 0, and only once training has started."""
        self.written = self.begun = 0.0
        self.before = 0.0
        """Seconds of earlier starts."""
        self.complained = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin, or go on with what the file says of the run that is resumed."""
        if not trainer.is_global_zero:
            return
        job, self.begun = SlurmJob.current(), time.monotonic()
        self.record = {
            "state": "running",
            "message": None,
            "name": self.folder.absolute().name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "slurm_job": job.id if job else None,
            "started": now(),
            "updated": now(),
            "starts": 1,
            "seconds": 0.0,
            "meta_step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "monitor": self.monitor,
            "mode": self.mode,
            "best": None,
            "log": job.log() if job else None,
        }
        with suppress(OSError, ValueError):  # no earlier file, or a damaged one
            earlier = read_record(self.folder)
            self.record["started"], self.record["starts"] = earlier["started"], earlier["starts"] + 1
            self.before = earlier["seconds"]
            self.record["best"] = self._still_best(earlier["best"], trainer.global_step)
        self._write()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say now and then that the run goes on."""
        self._beat(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """The same in a long validation."""
        self._beat(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the best value."""
        if self.record is None or trainer.sanity_checking:
            return
        value = float(trainer.callback_metrics.get(self.monitor or "", math.nan))
        if self.monitor is not None and math.isfinite(value) and self._is_better(value):
            self.record["best"] = Best(monitor=self.monitor, value=value, meta_step=trainer.global_step)
        self._update(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the last meta-step; the run is not finished yet."""
        if self.record is not None:
            self._update(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Note what went wrong."""
        if self.record is not None:
            self.record["meta_step"] = trainer.global_step
        self._fail(exception)

    def end(self, state: State, message: str | None = None) -> None:
        """Note how the run ended, and why; nothing if it never started.

        Args:
            state: anything but "running".
            message: one line.
        """
        if self.record is not None:
            self.record["state"], self.record["message"] = state, message
            self._write(durable=True)

    def __enter__(self) -> RunStateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.record is not None and self.record["state"] == "running":
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End as failed; who was interrupted has not failed."""
        if isinstance(error, Stopped):
            self.end("stopped", error.reason.text)
        elif isinstance(error, KeyboardInterrupt | SIGTERMException):
            self.end("stopped", "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "SIGTERM")
        else:
            self.end("failed", shorten(str(error) or type(error).__name__, 500, placeholder=" …"))

    def _still_best(self, best: Best | None, meta_step: int) -> Best | None:
        """An earlier best value, unless it lies after the meta-step that the run is resumed from."""
        known = best is not None and best["monitor"] == self.monitor and best["meta_step"] <= meta_step
        return best if known else None

    def _is_better(self, value: float) -> bool:
        assert self.record is not None
        best = self.record["best"]
        if best is None:
            return True
        return value < best["value"] if self.mode == "min" else value > best["value"]

    def _beat(self, trainer: L.Trainer) -> None:
        if self.record is not None and time.monotonic() - self.written >= HEARTBEAT:
            self._update(trainer)

    def _update(self, trainer: L.Trainer) -> None:
        assert self.record is not None
        self.record["meta_step"] = trainer.global_step
        self._write()

    def _write(self, durable: bool = False) -> None:
        """Write the file, or say once that it cannot be; waiting for the disk would slow small runs."""
        assert self.record is not None
        self.record["updated"], self.written = now(), time.monotonic()
        self.record["seconds"] = round(self.before + self.written - self.begun, 1)
        try:
            write_record(self.folder, self.record, durable)
        except OSError as error:
            if not self.complained:
                print(f"{self.folder / RUN_FILE} cannot be written ({error}); training goes on", flush=True)
            self.complained = True


def write_record(folder: Path, record: RunRecord, durable: bool) -> None:
    """Write ``run.json``; ``durable`` as in :func:`~l2l_scale.files.write_atomically`.

    Raises:
        OSError: if it cannot be written.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / RUN_FILE, text.encode(), durable)
