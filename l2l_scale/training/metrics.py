"""Callbacks that show how the meta-training goes: metrics of trajectories, and one progress bar."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from l2l_scale.sampling import WindowLoader
from l2l_scale.training.module import MetaTraining
from l2l_scale.training.step_output import StepOutput


class TrajectoryMetrics(Callback):
    """Logs, every ``trainer.log_every_n_steps`` meta-steps, what the slots did.

    - ``train/loss``: mean loss over the window and the slots that did not diverge;
    - ``train/loss_at/T``: the loss at the end of the windows that end at inner step T. Slots are at
      different points of their trajectories, so only losses of one phase are comparable over time;
    - ``train/update_rms``: root mean square of the last updates;
    - ``train/diverged``: share of slots that diverged in the window;

    of a mixture for each family on rank 0 (``train/loss/NAME``, …), and

    - ``train/num_diverged``: how many times a slot diverged since the start of the run, on this rank;
    - ``train/num_skipped``: how many meta-steps were dropped because their gradient was not finite;
    - ``train/grad_norm``: norm of the last gradient of φ, before clipping;
    - ``train/learning_rate``: of Adam on φ;
    - ``train/waited``: share of the time since the last line that the trainer waited for windows.

    A slot that diverged starts again at once, in the middle of its scheduled trajectory; until the next
    one it counts under the schedule's inner step, not its own.
    """

    def __init__(self) -> None:
        self.last = Clock(0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.last = Clock.of(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the window that was just trained on."""
        assert isinstance(pl_module, MetaTraining)
        every = trainer.log_every_n_steps * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        if pl_module.next_window % every:
            return
        now = Clock.of(trainer)
        windows: tuple[StepOutput, ...] = outputs["windows"]
        metrics = {
            **{name: value for window in windows for name, value in trajectory_metrics(window).items()},
            "train/num_diverged": float(pl_module.num_diverged),
            "train/num_skipped": float(pl_module.num_skipped),
            "train/grad_norm": float(pl_module.grad_norm),
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/waited": (now.waited - self.last.waited) / max(now.seconds - self.last.seconds, 1e-9),
        }
        self.last = now
        # Past Lightning's self.log: that counts batches in its own way, one off in a resumed run.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log("loss", float(outputs["loss"]), prog_bar=True, logger=False, batch_size=1)


class Clock(NamedTuple):
    """A moment of a run."""

    seconds: float
    waited: float
    """Seconds that the trainer has waited for windows until then."""

    @classmethod
    def of(cls, trainer: L.Trainer) -> Clock:
        """Now."""
        loader = trainer.train_dataloader
        return cls(time.perf_counter(), loader.waited if isinstance(loader, WindowLoader) else 0.0)


def trajectory_metrics(window: StepOutput) -> dict[str, float]:
    """The numbers of one family's window, over the slots that did not diverge."""
    alive, suffix = ~window.diverged, f"/{window.member}" if window.member else ""
    metrics = {
        f"train/diverged{suffix}": float(window.diverged.float().mean()),
        f"train/loss{suffix}": float(window.losses[:, alive].mean()),
        f"train/update_rms{suffix}": float(window.update_rms[alive].mean()),
    }
    for start in sorted(set(window.inner_step.tolist())):
        here = alive & (window.inner_step == start)
        loss = float(window.losses[-1, here].mean())
        metrics[f"train/loss_at/{start + len(window.losses)}{suffix}"] = loss
    return metrics


class MetaStepBar(TQDMProgressBar):
    """One bar for the whole run, in meta-steps, with the time left.

    Lightning's own bars start anew with every epoch; an epoch is only a rhythm here.
    """

    def init_train_tqdm(self) -> Tqdm:
        """A bar from the meta-step that the run starts at to its last."""
        return Tqdm(
            desc="meta-training",
            total=max(self.trainer.max_steps, 0) or None,
            initial=self.trainer.global_step,
            unit=" meta-steps",
            mininterval=0.2 if sys.stdout.isatty() else 10,  # seconds; a log file gets a line now and then
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
        )

    def init_validation_tqdm(self) -> Tqdm:
        """No bar: validations are short."""
        return Tqdm(disable=True)

    init_sanity_tqdm = init_validation_tqdm

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Keep the bar that the run started with."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance to the number of meta-steps done."""
        done, bar = trainer.global_step, self.train_progress_bar
        if self._should_update(done, bar.total or 0):
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(done - bar.n)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The numbers that matter, shortly."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: f"{value:.4g}" for name, value in metrics.items() if isinstance(value, float)}
