"""Callbacks that show how the meta-training goes: metrics of trajectories, and one progress bar."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from l2l_scale.training.module import MetaTraining, StepOutput


class TrajectoryMetrics(Callback):
    """Logs, every ``trainer.log_every_n_steps`` meta-steps, what the slots did.

    - ``train/loss``: mean loss over the window and the slots that did not diverge;
    - ``train/loss_at/T``: the loss at the end of the windows that end at inner step T. Slots are at
      different points of their trajectories, so only losses of one phase are comparable over time;
    - ``train/update_rms``: root mean square of the last updates;
    - ``train/diverged``: share of slots that diverged in the window;

    - ``train/num_diverged``: how many times a slot diverged since the start of the run;
    - ``train/num_skipped``: how many meta-steps were dropped because their gradient was not finite;
    - ``train/grad_norm``: norm of the last gradient of φ, before clipping;
    - ``train/learning_rate``: of Adam on φ.

    A slot that diverged starts again at once, in the middle of its scheduled trajectory; until the next
    one it counts under the schedule's inner step, not its own.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the window that was just trained on."""
        assert isinstance(pl_module, MetaTraining)
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        window: StepOutput = outputs["window"]
        metrics = {
            **trajectory_metrics(window),
            "train/num_diverged": float(pl_module.num_diverged),
            "train/num_skipped": float(pl_module.num_skipped),
            "train/grad_norm": float(pl_module.grad_norm),
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        # Past Lightning's self.log: that counts batches in its own way, one off in a resumed run.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        pl_module.log("loss", metrics["train/loss"], prog_bar=True, logger=False)


def trajectory_metrics(window: StepOutput) -> dict[str, float]:
    """The numbers of one window, over the slots that did not diverge."""
    alive = ~window.diverged
    metrics = {
        "train/diverged": float(window.diverged.float().mean()),
        "train/loss": float(window.losses[:, alive].mean()),
        "train/update_rms": float(window.update_rms[alive].mean()),
    }
    for start in sorted(set(window.inner_step.tolist())):
        here = alive & (window.inner_step == start)
        metrics[f"train/loss_at/{start + len(window.losses)}"] = float(window.losses[-1, here].mean())
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
