"""A picture at validations: loss curves of the rule in training against tuned hand-designed optimizers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread

from l2l_scale.checks import check_count
from l2l_scale.evaluation import Evaluation
from l2l_scale.evaluation.entrants import Entrant, Trial, entrants_of, plan_tests, run_all, tune_all
from l2l_scale.evaluation.jobs import Runner
from l2l_scale.evaluation.plots import plot_curves
from l2l_scale.evaluation.report import Curves
from l2l_scale.optimizers import UpdateRule
from l2l_scale.rng import Split
from l2l_scale.tasks import TaskFamily
from l2l_scale.training.data import WindowData
from l2l_scale.training.module import MetaTraining

LEARNED = "learned"


class ValidationCurves(Callback):
    """Draws the rule's loss curves on the validation tasks beside those of tuned baselines.

    The picture is ``validation.png`` in ``trainer.default_root_dir`` (the run folder under ``l2l-scale``),
    and goes to W&B and TensorBoard where they log. All loggers get ``valid/best_tuned_sum``, the lowest mean
    sum of losses of a baseline, which ``valid/sum`` compares with, and ``valid/best_tuned_final``.

    Cost: before the first window rank 0 tunes the baselines, while the other ranks wait. That is some hundred
    runs over the tuning tasks: a second for small quadratics, a minute for 16 networks on MNIST; the result
    is kept for later runs. Then every drawn validation costs as much as a validation once more, and a second
    for the picture. Training itself is not changed: φ is the same with it and without.

    Args:
        baselines: their names, see ``evaluation.baselines.BASELINES``.
        num_tuning_tasks: tasks that they are tuned on, none of which is a validation task; as many as there
            are validation tasks if not given.
        every: draw the first and then every so many validations.
        cache: keep results of tuning, and use those that were kept.

    Raises:
        ValueError: if a baseline is unknown, none is named, or a number is below 1.
    """

    def __init__(
        self,
        baselines: list[str] | None = None,
        num_tuning_tasks: int | None = None,
        every: int = 5,
        cache: bool = True,
    ) -> None:
        check_count("every", every)
        names = ["Adam", "heavy ball"] if baselines is None else baselines
        if not names:
            raise ValueError("baselines ([]) must name at least one; leave the callback out to have none")
        if num_tuning_tasks is not None:
            check_count("num_tuning_tasks", num_tuning_tasks)
        self.settings = Evaluation(baselines=names, num_reference_tasks=0, cache=cache)
        self.every, self.num_tuning_tasks = every, num_tuning_tasks
        self.num_validations = 0
        self.trials: dict[str, Trial] = {}
        self.tuned: dict[str, dict[str, Curves]] = {}

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, so that a resumed run draws the same ones."""
        return {"num_validations": self.num_validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_validations = state_dict["num_validations"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collective. Tune the baselines and run them on the validation tasks."""
        if trainer.is_global_zero:
            started = time.perf_counter()
            for name, family in families(window_data(trainer)).items():
                self._tune(name, family, window_data(trainer), str(pl_module.device))
            seconds = time.perf_counter() - started
            names = ", ".join(self.settings.baselines or [])
            print(f"validation curves: {names} tuned in {seconds:.0f} s", flush=True)
        trainer.strategy.barrier("validation curves: tuned")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collective. Draw, if it is the turn of this validation."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, MetaTraining)
        if self.num_validations % self.every == 0:
            for name in self.trials:  # none but on rank 0
                self._draw(name, pl_module.rule, trainer)
            trainer.strategy.barrier("validation curves: drawn")
        self.num_validations += 1

    def _tune(self, name: str, family: TaskFamily, data: WindowData, device: str) -> None:
        """Tune for a family, and run on its validation tasks."""
        horizon = data.schedule.horizon
        settings = replace(
            self.settings,
            num_tasks=data.valid_tasks,
            num_tuning_tasks=self.num_tuning_tasks or data.valid_tasks,
            inner_steps=horizon,
            device=device,
        )
        trial = plan_tests(family, horizon, settings)[0]
        trial = trial._replace(held_out=replace(trial.held_out, split=Split.VALID, seed=data.seed))
        tuned = tune_all([trial], settings, Runner(1))
        self.trials[name] = trial
        self.tuned[name] = _run(trial, entrants_of(trial, {}, tuned, settings))

    def _draw(self, name: str, rule: UpdateRule, trainer: L.Trainer) -> None:
        """Run the rule, draw all, and log that."""
        trial, step = self.trials[name], trainer.global_step
        entrant = Entrant("learned", deepcopy(rule).float(), {})  # the tasks are in single precision
        curves = {LEARNED: _run(trial, {LEARNED: entrant})[LEARNED], **self.tuned[name]}
        Path(trainer.default_root_dir).mkdir(parents=True, exist_ok=True)
        path = Path(trainer.default_root_dir) / f"validation{'-' * bool(name)}{name}.png"
        title = f"{trial.held_out.num_tasks} validation tasks, after {step:,} meta-steps"
        plot_curves(curves, trial.tuning.inner_steps, title, repr(trial.held_out.family), path)
        suffix = f"/{name}" if name else ""
        for logger in trainer.loggers:
            logger.log_metrics(best_of(self.tuned[name], suffix), step=step)
            log_picture(logger, f"valid/curves{suffix}", path, step)


def window_data(trainer: L.Trainer) -> WindowData:
    """The data module that trains.

    Raises:
        ValueError: if it is not ours.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, WindowData):
        raise ValueError(
            f"ValidationCurves needs the tasks of a WindowData, but data is a {type(data).__name__}; leave "
            "the callback out of trainer.callbacks"
        )
    return data


def families(data: WindowData) -> dict[str, TaskFamily]:
    """What is drawn, one picture each, by a name for the picture; a single family needs none."""
    return data.mixture.families


def best_of(tuned: Mapping[str, Curves], suffix: str) -> dict[str, float]:
    """The lowest mean sum of losses and the lowest mean final loss of the baselines."""
    sums = [float(entry.losses[1:].double().sum(0).mean()) for entry in tuned.values()]
    finals = [float(entry.losses[-1].double().mean()) for entry in tuned.values()]
    return {f"valid/best_tuned_sum{suffix}": min(sums), f"valid/best_tuned_final{suffix}": min(finals)}


def log_picture(logger: Logger, key: str, path: Path, step: int) -> None:
    """Log a picture where the logger takes pictures."""
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [str(path)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, imread(path), step, dataformats="HWC")


def _run(trial: Trial, entrants: Mapping[str, Entrant]) -> dict[str, Curves]:
    """Loss curves on the validation tasks, in this process."""
    return run_all([trial], [entrants], Runner(1))[0]
