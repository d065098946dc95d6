"""How much of its time the trainer waits for windows, while it trains the LSTM on the paper's MNIST MLP."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from quiet import Others
from sampling_jobs import streamed_images
from sampling_sources import Entrant, Source

from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.sampling import WindowLoader
from l2l_scale.training import MetaTraining
from l2l_scale.training.data import WindowData

SKIPPED = 10
"""Windows at the start of a round that do not count: some of them may have been drawn before it."""


class Waiting(NamedTuple):
    """What one round brought, per window."""

    total: float
    """Seconds, everything included."""
    waited: float
    """Seconds that the trainer waited, the copy into a batch included."""
    others: float
    """Cores that other programs were busy on."""

    @property
    def share(self) -> float:
        """Of the time."""
        return self.waited / self.total


class Watch(Callback):
    """Looks at the clock, and at how long the loader has been waited for."""

    def __init__(self, loader: WindowLoader) -> None:
        self.loader, self.marks = loader, list[tuple[float, float]]()
        self.others: Others | None = None
        self.disturbed = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before a meta-step, after its window was waited for."""
        if len(self.marks) == SKIPPED:
            self.others = Others()
        self.marks.append((time.perf_counter(), self.loader.waited))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """See who else was there."""
        assert self.others is not None
        self.disturbed = self.others.cores()

    def result(self) -> Waiting:
        """From the first window that counts to the last."""
        (start, waited), (end, waited_after) = self.marks[SKIPPED], self.marks[-1]
        windows = len(self.marks) - 1 - SKIPPED
        return Waiting((end - start) / windows, (waited_after - waited) / windows, self.disturbed)


class Training:
    """Meta-training under Lightning that goes on from round to round.

    Args:
        entrant: how windows are drawn.
        share: CPUs that an actor counts for.
        windows: of a round, besides those that are skipped.
    """

    def __init__(self, entrant: Entrant, share: float, windows: int) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        torch.manual_seed(0)
        family = streamed_images()
        data = WindowData(family, slots=1)
        self.source = Source(data, entrant, share, epoch=windows + SKIPPED + 1)
        self.module = MetaTraining(CoordinatewiseLSTM(), family, final_fraction=1)

    def round(self) -> Waiting:
        """Train for an epoch."""
        watch = Watch(self.source.loader)
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[watch], **quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(self.module, self.source.loader)
        return watch.result()

    def close(self) -> None:
        """Let the actors end."""
        self.source.close()
