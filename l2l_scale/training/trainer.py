"""Lightning's trainer, with checkpoints that are whole or not there, and that hold the slots of all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from l2l_scale.training.checkpoints.callback import Checkpoints
from l2l_scale.training.checkpoints.shelf import LAST, has_checkpoint
from l2l_scale.training.checkpoints.store import CheckpointFolders, save_together


class Trainer(L.Trainer):
    """Lightning's trainer; the arguments are the same.

    ``save_checkpoint`` writes a folder (see :mod:`l2l_scale.training.checkpoints.folder`), each rank its own
    slots, and ``ckpt_path`` takes one. Under SLURM Lightning's own signal handler, which saves in the middle
    of a step, is off: :class:`~l2l_scale.training.Checkpoints` heeds signals at window boundaries.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.pop("plugins", None) or []
        plugins = list(given) if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(CheckpointFolders())
        free = not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
        if free and SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))
        super().__init__(*args, plugins=plugins, **kwargs)
        self.texts: dict[str, str] = {}
        """Files that go into every checkpoint, by name: the configuration."""

    def fit(
        self,
        model: L.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train; ``ckpt_path`` may be "last": the last whole one of our callback, or a fresh start."""
        if ckpt_path == LAST:
            ours = [one for one in self.checkpoint_callbacks if isinstance(one, Checkpoints)]
            folder = ours[0].folder(self) if ours else None
            if folder is not None:
                ckpt_path = folder / LAST if has_checkpoint(folder) else None
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Collective. Write a checkpoint, all of it or nothing.

        Args:
            filepath: the folder that it becomes.
            weights_only: only φ; leave out optimizer, loops and callbacks.
            storage_options: for other CheckpointIO plugins than ours.

        Raises:
            CheckpointError: on all ranks, if one of them could not write.
        """
        if not isinstance(self.strategy.checkpoint_io, CheckpointFolders):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        # What Lightning itself does here, but that every rank has something to write.
        content = self._checkpoint_connector.dump_checkpoint(weights_only)
        save_together(content, Path(filepath), self.texts)
