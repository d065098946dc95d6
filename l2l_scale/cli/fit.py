"""``l2l-scale fit``: meta-train a rule."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from l2l_scale.cli.experiment import Experiment, check_rhythm
from l2l_scale.cli.export import export_rule
from l2l_scale.cli.headline import headline
from l2l_scale.cli.loggers import all_loggers, ending, give_folder, log_rule, take_folder, wandb_runs
from l2l_scale.cli.main import MISTAKES
from l2l_scale.cli.run_folder import (
    RUN_DIR_VARIABLE,
    choose_folder,
    empty,
    find_checkpoint,
    keeping_metrics,
    launched_by_lightning,
    occupied,
)
from l2l_scale.cli.run_log import close_log, note_failure, open_log, say
from l2l_scale.cli.srun import settle_srun
from l2l_scale.cli.stopping import end_with_parent, leave, stop_here
from l2l_scale.deploy import classes_of
from l2l_scale.files import write_atomically
from l2l_scale.training import Checkpoints, MetaStepBar, PaceReport, Stopped, Trainer, TrajectoryMetrics
from l2l_scale.training.checkpoints.shelf import LAST
from l2l_scale.training.memory import Machine, check_memory
from l2l_scale.training.precision import check_precision
from l2l_scale.training.run_state import RunStateFile
from l2l_scale.training.slurm_job import SlurmJob
from l2l_scale.training.surroundings import git_state, versions


class Fit(Experiment):
    """Meta-training into a run folder."""

    description = (
        "Meta-train a rule. The run folder gets config.yaml, metrics.csv, checkpoints/ and the best rule."
    )

    began = False
    """Whether training has begun, after all checks."""

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add what a run starts from."""
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="delete what is in run_dir and start anew"
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="resume from a checkpoint; 'last' is that of run_dir, or a fresh start where it has none",
        )
        parser.add_argument(
            "--check_memory", type=bool, default=True, help="refuse a run that cannot fit into memory"
        )

    def before_instantiate_classes(self) -> None:
        """Settle the run folder first: a mistake there should cost nothing."""
        config = self.config
        check_precision(config.trainer.precision)  # Lightning makes another one of 16-mixed on a CPU
        torch.set_float32_matmul_precision(config.float32_matmul)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.folder = choose_folder(config.run_dir, self.name, config.ckpt_path, config.overwrite)
        self.ckpt_path = find_checkpoint(config.ckpt_path, self.folder)
        config.run_dir = str(self.folder)
        give_folder(config.trainer, self.folder)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(self.folder / "checkpoints")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with our logger, what is configured besides, and our callbacks."""
        checkpoint = self.config.checkpoint
        self.run_state = RunStateFile(self.folder, checkpoint.monitor, checkpoint.mode)
        own: list[Callback] = [RunFolder(self), self.run_state, PaceReport(), TrajectoryMetrics()]
        if self.config.trainer.enable_progress_bar in (None, True):
            own.append(MetaStepBar())
        self.trainer_defaults["callbacks"] = own
        if self.config.trainer.enable_checkpointing is False:
            self.parser.callback_keys.remove("checkpoint")
        kwargs["logger"] = all_loggers(self.config_init.trainer.logger, self.folder)
        kwargs["default_root_dir"] = self.config.trainer.default_root_dir or str(self.folder)
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, Trainer)
        # First of all: what other callbacks write or log at the start belongs to the new run.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: not isinstance(callback, RunFolder))
        return trainer

    def train(self) -> None:
        """Train, then export the best rule and say what comes next."""
        trainer, started = self.trainer, time.perf_counter()
        check_rhythm(trainer.max_steps, self.datamodule.windows_per_epoch, trainer.accumulate_grad_batches)
        self.datamodule.seats(trainer.global_rank, trainer.world_size)  # raises where they do not fit
        if trainer.local_rank == 0:
            self.datamodule.actors.check(trainer.num_devices)
        if self.config.check_memory and trainer.local_rank == 0:  # once per host: it counts all its ranks
            check_memory(self.model, self.datamodule, machine_of(trainer))
        with ExitStack() as stack:
            stack.callback(signal.signal, signal.SIGUSR1, signal.getsignal(signal.SIGUSR1))
            stack.callback(os.environ.pop, RUN_DIR_VARIABLE, None)
            if trainer.is_global_zero:
                stack.enter_context(occupied(self.folder))
                began = lambda: self.run_state.record is not None  # noqa: E731
                # Before Lightning sets its logger up, which deletes them.
                stack.enter_context(keeping_metrics(self.folder, began))
            stack.enter_context(ending(trainer.loggers))
            stack.enter_context(self.run_state)
            self.fit(trainer)
            if trainer.is_global_zero:
                if self.run_state.record is None:  # nothing was left to train: killed at its very end
                    self.begin()
                    self.run_state.on_train_start(trainer, self.model)
                self.finish(time.perf_counter() - started)
            self.run_state.end("finished")
        close_log()
        if not trainer.is_global_zero:
            leave()

    def fit(self, trainer: L.Trainer) -> None:
        """Train; a run that was stopped in good order ends the process here."""
        # It is heeded while windows are trained. One that comes later would kill a run that is complete.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path)
        except SystemExit as stop:  # Lightning's answer to a second Ctrl-C
            if trainer.interrupted:
                raise KeyboardInterrupt from stop
            raise
        except Stopped as stop:
            stop_here(stop, self.run_state, self.folder)
        except MISTAKES as error:
            if self.began:  # so it was no mistake of the user's
                raise RuntimeError(str(error) or repr(error)) from error
            raise

    def begin(self) -> None:
        """Make room where that was asked for, write the configuration, and say what is about to run."""
        if self.config.overwrite:
            empty(self.folder)
        self.save_config()
        open_log(self.folder)
        say(headline(self.model, self.datamodule, self.trainer, self.folder))
        self.begin_logging()

    def begin_logging(self) -> None:
        """Start the runs of W&B, now that it is sure that there will be something to log."""
        for run in wandb_runs(self.trainer.loggers):
            run.begin()
            text = self.parser.dump(self.saved_config(), "json", skip_none=False, skip_validation=True)
            run.log_hyperparams({**json.loads(text), "git": git_state(), "versions": versions()})

    def saved_config(self) -> Namespace:
        """The configuration, all defaults included, such that every command takes it again."""
        config: Namespace = self.config.clone()
        take_folder(config.trainer, self.folder)
        if config.checkpoint.dirpath == str(self.folder / "checkpoints"):
            config.checkpoint.dirpath = None  # else a run from this file would write into this folder
        if SlurmJob.current() is not None:  # the job script gives these; without it a process would wait
            config.trainer.devices = config.trainer.num_nodes = 1
        for option in ("config", "overwrite", "ckpt_path", "check_memory"):
            config.pop(option, None)
        return config

    def save_config(self) -> None:
        """Write the configuration into the run folder."""
        config = self.saved_config()
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        write_atomically(self.folder / "config.yaml", text.encode())
        self.trainer.texts["config.yaml"] = text  # type: ignore[attr-defined]

    def finish(self, seconds: float) -> None:
        """Export the best rule and say where everything is."""
        say(f"meta-training took {seconds:.0f} s ({self.trainer.global_step:,} meta-steps)")
        ours = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, Checkpoints)]
        if not ours:
            say("no checkpoint was written (trainer.enable_checkpointing is false)")
            return
        out, classes = self.folder / "rule.safetensors", classes_of(self.model.rule)
        rule = export_rule(ours[0].folder(self.trainer) / LAST, out, classes, best=True)
        log_rule(self.trainer.loggers, rule)
        chosen = (
            f"best rule by {self.config.checkpoint.monitor}"
            if ours[0].retention.best
            else "rule (not validated)"
        )
        say(f"{chosen}: {rule}")
        say(f"next: l2l-scale evaluate -c {self.folder / 'config.yaml'}")


class RunFolder(Callback):
    """Writes what a run starts with, once everything has been checked and is about to start."""

    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the run."""
        if trainer.is_global_zero:
            self.fit.begin()
        self.fit.began = True

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Note why a run failed; one that was stopped in good order has not."""
        if isinstance(exception, Stopped):
            for run in wandb_runs(trainer.loggers):
                run.mark_preempted()
        else:
            note_failure(exception)


def machine_of(trainer: L.Trainer) -> Machine:
    """What the trainer trains on."""
    return Machine(
        device=trainer.strategy.root_device,
        ranks_per_node=trainer.num_devices,
        world_size=trainer.world_size,
        dtype=torch.float64 if trainer.precision == "64-true" else torch.float32,
    )


def run(arguments: list[str]) -> None:
    """Train as the command line says."""
    settle_srun()
    warnings.filterwarnings("ignore", category=PossibleUserWarning)  # advice that does not fit our loaders
    warnings.filterwarnings("ignore", message=".*directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    if launched_by_lightning(os.environ):
        end_with_parent()
    Fit(arguments).train()
