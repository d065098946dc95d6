"""When a checkpoint is written."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from l2l_scale.checks import check_count, check_range
from l2l_scale.training.checkpoints import shelf
from l2l_scale.training.checkpoints.folder import tidy
from l2l_scale.training.checkpoints.inflight import KEY
from l2l_scale.training.checkpoints.retention import Retention
from l2l_scale.training.checkpoints.store import LOADED_FROM, on_rank_0
from l2l_scale.training.preemption import Interruption, Reason, Stopped
from l2l_scale.training.ranks import most_of_all_ranks
from l2l_scale.training.slurm_job import SlurmJob
from l2l_scale.training.validation import monitored

STATE_KEY = "Checkpoints"
"""Where Lightning keeps this callback's state in a checkpoint."""


class Checkpoints(Checkpoint):
    """Writes checkpoints into the run folder, for a run that goes on as if it had never stopped.

    One is written at the first validation after ``every_seconds``, or between validations after twice that
    time; at the end; and when the run is stopped. When that is changes no result: the φ that was best so
    far in validation is in each of them.

    Args:
        monitor: the metric that chooses the best φ.
        mode: whether less or more of it is better.
        every_seconds: time between checkpoints.
        max_share: of the training time that writing may take; where it is slow there are fewer.
        every_n_meta_steps: write after so many meta-steps instead, however long they take.
        keep_last: how many of the last ones to keep; with 2 there is one to fall back to.
        keep_best: how many of those that were best in validation to keep besides.
        dirpath: folder of the checkpoints; ``checkpoints`` in the run folder if not given.
        heed_signals: stop with a checkpoint and :class:`~l2l_scale.training.Stopped` after Ctrl-C, SIGTERM,
            SIGUSR1, and before the time limit of a SLURM job.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        monitor: str = "valid/sum",
        mode: Literal["min", "max"] = "min",
        every_seconds: float = 30.0,
        max_share: float = 0.01,
        every_n_meta_steps: int | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        dirpath: str | None = None,
        heed_signals: bool = True,
    ) -> None:
        check_range("every_seconds", every_seconds, 0, math.inf)
        check_range("max_share", max_share, 1e-6, 1)
        if every_n_meta_steps is not None:
            check_count("every_n_meta_steps", every_n_meta_steps)
        self.every_seconds, self.max_share = every_seconds, max_share
        self.every_n_meta_steps = every_n_meta_steps
        self.retention = Retention(monitor, mode, keep_last, keep_best)
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.interruption = Interruption(SlurmJob.current()) if heed_signals else None
        self.seconds = 0.0  # that the last one took
        self._began_at = 0.0
        self._saved_at = 0
        self._loaded: Path | None = None

    @property
    def state_key(self) -> str:
        """The same whatever the arguments."""
        return STATE_KEY

    def folder(self, trainer: L.Trainer) -> Path:
        """Of the checkpoints."""
        return Path(trainer.default_root_dir) / "checkpoints" if self.dirpath is None else self.dirpath

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder; finish what an interrupted run left; take note of signals from now on."""
        self.dirpath = self.folder(trainer)
        if trainer.is_global_zero and self.dirpath.is_dir():
            tidy(self.dirpath)
        if self.interruption is not None:
            # Lightning's own handler calls a collective, and stops without a checkpoint.
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            self.interruption.install()
            if not trainer.is_global_zero:
                self.interruption.job = None  # one rank is enough to ask SLURM when the job ends

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do what the run that is resumed was killed before it had done: set the link, delete what may go."""
        if self._loaded is not None and trainer.is_global_zero:
            self._settle(self._loaded)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock.

        Raises:
            ValueError: if there would never be a moment to write one.
        """
        if trainer.num_training_batches <= trainer.accumulate_grad_batches and not trainer.enable_validation:
            raise ValueError(
                f"data.windows_per_epoch ({trainer.num_training_batches}) must be more than one meta-step "
                "where there is no validation (trainer.limit_val_batches): checkpoints are written between "
                "the meta-steps of an epoch, or after a validation"
            )
        if self._loaded is None and self.dirpath is not None:
            self.retention.spare |= {path.name for path in shelf.checkpoints_in(self.dirpath)}
        self._began_at = time.monotonic()
        self._saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Collective. Write one if it is time, or if the run is to stop."""
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        # Where a validation is next, a run that goes on from here would leave it out; at the end of an epoch
        # Lightning would count the epoch twice. Then there is a boundary soon after.
        skip = loop._should_check_val_fx(fetcher) or loop.batch_progress.is_last_batch
        if not loop._should_accumulate() and not skip:
            self._at_boundary(trainer, pl_module, intervals=2)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collective. Remember φ if it is the best; write a checkpoint if it is time."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.retention.validated(monitored(trainer.callback_metrics, self.retention.monitor), pl_module)
        if not trainer.fit_loop.epoch_loop._should_accumulate():  # else gradients are in flight
            self._at_boundary(trainer, pl_module, intervals=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collective. Write the last state of the run."""
        name = shelf.name_of(trainer.global_step)
        if (
            self._saved_at != trainer.global_step
            or self.dirpath is None
            or not (self.dirpath / name).exists()
        ):
            self.save(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        if self.interruption is not None:
            self.interruption.restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back; a run that was stopped hears them no more."""
        if self.interruption is not None:
            self.interruption.restore(stopped=isinstance(exception, Stopped))

    def _at_boundary(self, trainer: L.Trainer, module: L.LightningModule, intervals: int) -> None:
        """Collective. Write a checkpoint if it is time or the run is to stop.

        Raises:
            Stopped: on all ranks, if any of them has a reason.
        """
        reason = Reason.NONE if self.interruption is None else self.interruption.reason(self.seconds)
        due = self._is_due(trainer.global_step, intervals)
        agreed = most_of_all_ranks(module, 2 * reason + due)
        reason, due = Reason(agreed // 2), bool(agreed)
        if due:
            path = self.save(trainer)
            if reason:
                raise Stopped(reason, str(path))

    def _is_due(self, step: int, intervals: int) -> bool:
        """Whether so many intervals have passed, on this rank's clock."""
        if self.every_n_meta_steps is not None:  # a moment that was no boundary is made up for
            return step // self.every_n_meta_steps > self._saved_at // self.every_n_meta_steps
        interval = max(self.every_seconds, self.seconds / self.max_share)
        return time.monotonic() - self._began_at >= intervals * interval

    def save(self, trainer: L.Trainer) -> Path:
        """Collective. Write a checkpoint now, at a window boundary; delete those that need not be kept."""
        started = time.monotonic()
        assert self.dirpath is not None
        path = self.dirpath / shelf.name_of(trainer.global_step)
        self.retention.writing(path.name, trainer.global_step)
        trainer.save_checkpoint(path)
        self._saved_at = trainer.global_step
        on_rank_0(path, lambda: self._settle(path))
        self.seconds = time.monotonic() - started
        self._began_at = time.monotonic()
        return path

    def _settle(self, path: Path) -> None:
        """Point to what was written; delete what need not be kept."""
        shelf.point_to(path)
        there = [one.name for one in shelf.checkpoints_in(path.parent)]
        shelf.prune(path.parent, self.retention.to_keep(there), self.retention.spare)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return self.retention.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.retention.load_state_dict(state_dict)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave newer checkpoints than this one alone: they were damaged, or are of another future."""
        path = checkpoint.get(KEY, {}).get(LOADED_FROM)
        if path and self.dirpath is not None and Path(path).parent.resolve() == self.dirpath.resolve():
            self._loaded = Path(path)
            self.retention.spare = {one.name for one in shelf.newer_than(Path(path))}
