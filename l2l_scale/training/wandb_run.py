"""Weights & Biases, for runs that must not depend on it: no prompt, no waiting for a server, no failure."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from l2l_scale.checks import check_positive
from l2l_scale.training.wandb_client import Client, Mode, files_in, say, shortly


class WandbRun(WandbLogger):
    """Logs to one W&B run, whose id is kept in the run folder: a resumed run goes on with the same id.

    What fails on the side of W&B is said in one line, and the training goes on: without a key, or without a
    server that answers, the run is logged offline. wandb itself says nothing unless ``WANDB_SILENT`` is
    "false". Its files are in the folder ``wandb`` of the run folder, its cache and what waits for an upload
    too, unless ``WANDB_DATA_DIR`` or ``WANDB_CACHE_DIR`` say otherwise. Only rank 0 talks to it.

    Args:
        project: of the run.
        entity: user or team; that of the key if not given.
        name: of the run; that of the run folder if not given.
        group: that the run belongs to.
        tags: of the run.
        mode: whether to upload; if not given, what ``WANDB_MODE`` or ``wandb offline`` say, else online where
            there is a key.
        save_dir: the run folder; ``l2l-scale`` fills it in.
        init_timeout: seconds to wait for the server at the start.
        finish_timeout: seconds to wait at the end for what is not uploaded yet; it stays on disk.

    Raises:
        ValueError: if a timeout is not above zero.
    """

    def __init__(
        self,
        project: str = "l2l_scale",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: Mode | None = None,
        save_dir: str | None = None,
        init_timeout: float = 20.0,
        finish_timeout: float = 20.0,
    ) -> None:
        check_positive("init_timeout", init_timeout)
        check_positive("finish_timeout", finish_timeout)
        folder = Path(save_dir or ".")
        if name is None and save_dir and "WANDB_NAME" not in os.environ:
            name = folder.name
        super().__init__(project=project, name=name, save_dir=folder)
        arguments = {"project": project, "entity": entity, "name": name, "group": group, "tags": tags}
        self.client = Client(folder, mode, init_timeout, finish_timeout, arguments)
        self._closed = False
        self._failed: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, which starts when it is first asked for; without one, something that does nothing."""
        if self._experiment is None and not self._closed:
            self._experiment = self.client.start()
            self._closed = self._experiment is None
        return DummyLogger().experiment if self._experiment is None else self._experiment

    def wait(self) -> None:
        """Start nothing before :meth:`begin`: Lightning asks for the experiment before it checks anything."""
        self._closed = True

    def begin(self) -> None:
        """Start the run now."""
        self._closed = False
        _ = self.experiment

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """End the run; what is logged after it is lost."""
        run: Any = self._experiment
        self._experiment, self._closed = None, True
        if run is not None:
            self.client.finish(run, exit_code)

    def finalize(self, status: str) -> None:
        """End a run that failed. One that succeeded is not at its end: its rule is logged after the fit."""
        if status != "success":
            self.finish(exit_code=1)

    def mark_preempted(self) -> None:
        """Tell W&B that the end that comes is none: the run will go on."""
        self._try(self._mark_preempted)

    def _mark_preempted(self) -> None:
        self.experiment.mark_preempting()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a meta-step."""
        self._try(super().log_metrics, metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Write into the config of the run."""
        self._try(super().log_hyperparams, params)

    def log_table(self, key: str, *args: Any, **kwargs: Any) -> None:
        """Log a table; see :class:`WandbLogger`."""
        self._try(super().log_table, key, *args, **kwargs)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log pictures at a meta-step; see :class:`WandbLogger`."""
        self._try(super().log_image, key, images, step, **kwargs)

    def log_files(self, kind: str, files: Sequence[Path], notes: Mapping[str, Any] | None = None) -> None:
        """Log files as the artifact ``KIND-ID`` of type ``kind``, ID being that of the run.

        Args:
            kind: what they are.
            files: the files; they are copied.
            notes: metadata of the artifact.
        """
        self._try(self._log_files, kind, files, notes)

    def _log_files(self, kind: str, files: Sequence[Path], notes: Mapping[str, Any] | None) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self.experiment.id}", type=kind, metadata=dict(notes or {}))
        for file in files:
            artifact.add_file(str(file))
        self.experiment.log_artifact(artifact)

    @rank_zero_only
    def _try(self, log: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Log if there is a run. What failed once is not tried again: every try could take long."""
        _ = self.experiment
        if self._experiment is None or log.__name__ in self._failed:
            return
        try:
            with files_in(self.client.folder / "wandb"):
                log(*args, **kwargs)
        except Exception as error:
            self._failed.add(log.__name__)
            say(f"{log.__name__.lstrip('_')} failed, and is not tried again in this run ({shortly(error)})")
