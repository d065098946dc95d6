"""``l2l-scale fit``: meta-train a rule."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from l2l_scale.cli.experiment import Experiment
from l2l_scale.cli.export import export_rule
from l2l_scale.training import MetaStepBar, TrajectoryMetrics

RUN_DIR_VARIABLE = "L2L_SCALE_RUN_DIR"  # how the processes that Lightning starts learn the folder


class Fit(Experiment):
    """Meta-training into a run folder."""

    description = (
        "Meta-train a rule. The run folder gets config.yaml, metrics.csv, checkpoints/ and the best rule."
    )

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add what a run starts from."""
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="delete what is in run_dir and start anew"
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="resume from a checkpoint, or the 'last' of run_dir",
        )

    def before_instantiate_classes(self) -> None:
        """Settle the run folder first: a mistake there should cost nothing."""
        config = self.config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.folder = choose_folder(config.run_dir, self.name, config.ckpt_path is not None, config.overwrite)
        self.ckpt_path = find_checkpoint(config.ckpt_path, self.folder)
        config.run_dir = str(self.folder)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(self.folder / "checkpoints")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Lightning's trainer with our logger (unless another is configured) and callbacks."""
        own: list[Callback] = [TrajectoryMetrics(), RunFolder(self)]
        if self.config.trainer.enable_progress_bar in (None, True):
            own.append(MetaStepBar())
        self.trainer_defaults["callbacks"] = own
        if self.config.trainer.logger in (None, True):
            kwargs["logger"] = CSVLogger(self.folder, name="", version="", flush_logs_every_n_steps=20)
        return super().instantiate_trainer(**kwargs)

    def train(self) -> None:
        """Train, then export the best rule and say what comes next."""
        trainer, started = self.trainer, time.perf_counter()
        trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path)
        if trainer.is_global_zero:
            self.finish(time.perf_counter() - started)

    def save_config(self) -> None:
        """Write the configuration, all defaults included, so that every command takes it again."""
        config = self.config.clone()
        for option in ("config", "overwrite", "ckpt_path"):
            config.pop(option, None)
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")

    def headline(self) -> str:
        """What is about to run."""
        data, size = self.datamodule, sum(p.numel() for p in self.model.rule.parameters())
        return (
            f"meta-training {type(self.model.rule).__name__} ({size:,} parameters) on {data.family}\n"
            f"{data.slots} slots, windows of {data.schedule.window} of a horizon of {data.schedule.horizon}, "
            f"{self.trainer.max_steps:,} meta-steps, seed {data.seed}; run folder {self.folder}"
        )

    def finish(self, seconds: float) -> None:
        """Export the best rule and say where everything is."""
        checkpoints = self.trainer.checkpoint_callback
        best = Path(str(getattr(checkpoints, "best_model_path", "")))
        print(f"meta-training took {seconds:.0f} s ({self.trainer.global_step:,} meta-steps)")
        if not best.is_file():
            print("no checkpoint was written (no validation came, or trainer.enable_checkpointing is false)")
            return
        rule = export_rule(best, self.folder / "rule.safetensors", own=self.model.rule)
        print(f"best rule by {self.config.checkpoint.monitor}: {rule}")
        print(f"next: l2l-scale evaluate -c {self.folder / 'config.yaml'}")


class RunFolder(Callback):
    """Writes what a run starts with, once everything has been checked and is about to start."""

    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the configuration and say what is about to run."""
        self.fit.save_config()
        keep_metrics(self.fit.folder)
        print(self.fit.headline(), flush=True)


def choose_folder(wish: str | None, name: str, resumes: bool, overwrite: bool) -> Path:
    """The run folder; a fresh numbered one where none is wished for.

    Raises:
        ValueError: if the folder has a run in it that is neither resumed nor to be overwritten.
    """
    if RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    folder = Path(wish) if wish else _fresh(Path("runs"), name)
    if folder.exists() and any(folder.iterdir()) and not resumes:
        if not overwrite:
            raise ValueError(
                f"run_dir ({folder}) is not empty; resume it with --ckpt_path last, replace it with "
                "--overwrite true, or choose another folder"
            )
        _empty(folder)
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    return folder


def keep_metrics(folder: Path) -> None:
    """Put the metrics of a run that is resumed out of the way: the logger starts its file anew."""
    metrics, number = folder / "metrics.csv", 1
    while (kept := folder / f"metrics-{number}.csv").exists():
        number += 1
    if metrics.exists():
        metrics.rename(kept)


@rank_zero_only
def _empty(folder: Path) -> None:
    """Delete a run; only what a run writes, so that a mistyped folder loses nothing else."""
    for name in ("checkpoints", "evaluation"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / "config.yaml", folder / "rule.safetensors", *folder.glob("metrics*.csv")):
        path.unlink(missing_ok=True)


def _fresh(parent: Path, name: str) -> Path:
    folder, number = parent / name, 1
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def find_checkpoint(wish: str | None, folder: Path) -> str | None:
    """The checkpoint to resume from.

    Raises:
        ValueError: if it does not exist.
    """
    if wish is None:
        return None
    path = folder / "checkpoints" / "last.ckpt" if wish == "last" else Path(wish)
    if not path.is_file():
        raise ValueError(
            f"ckpt_path ({wish}): there is no checkpoint {path}; run folders keep theirs in checkpoints/"
        )
    return str(path)


def run(arguments: list[str]) -> None:
    """Train as the command line says."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    Fit(arguments).train()
