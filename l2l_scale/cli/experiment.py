"""The one configuration that all commands share: model, data, trainer, checkpoint, evaluation.

A YAML file holds choices, the constructors of the classes hold the defaults, and overlays are more
``-c`` files. Built on LightningCLI, so everything a Lightning user knows works.
"""

from __future__ import annotations

import logging
import os
import warnings
from abc import abstractmethod
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from l2l_scale.cli.errors import suggestion
from l2l_scale.evaluation import Evaluation
from l2l_scale.tasks import TaskFamily
from l2l_scale.training import Checkpoints, MetaTraining, Trainer, WindowData

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's calls, not of ours

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "max_steps": 1000,
    "devices": 1,
    "log_every_n_steps": 20,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
    "inference_mode": False,  # losses of held-out trajectories need the inner gradients
}


class Experiment(LightningCLI):
    """Parses a configuration and builds its objects; a command is a subclass that runs them.

    Args:
        arguments: the command line after the command's name.
    """

    description: str
    """What ``--help`` says first."""

    def __init__(self, arguments: list[str]) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)  # we say what runs ourselves
        # sys.argv must stay: the processes that Lightning starts for more devices are made from it.
        warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
        super().__init__(
            MetaTraining,
            WindowData,
            trainer_class=Trainer,
            save_config_callback=None,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            args=arguments,
            parser_kwargs={"exit_on_error": False, "description": self.description},
        )

    @abstractmethod
    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add the command's own options."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is ours to Lightning's groups, and tie together what must be the same."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_class_arguments(Evaluation, "evaluation")
        parser.link_arguments("data.family", "model.family", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="run folder; a new runs/CONFIG[-n] if not given"
        )
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of training; torch decides if not given. Small tasks are fastest with 1",
        )
        parser.add_argument(
            "--float32_matmul",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="precision of float32 matrix products on GPUs: high and medium allow TF32, which is faster "
            "and keeps 10 bits of each factor (torch.set_float32_matmul_precision)",
        )
        self.add_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; an unknown name comes back with the nearest known one."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ArgumentError(None, str(error).strip() + suggestion(str(error), parser)) from error

    @property
    def name(self) -> str:
        """What the run is called: the first configuration file's name."""
        files = self.config.config or []
        return Path(str(files[0])).stem if files else "run"


class Reader(Experiment):
    """An experiment that is not trained: everything is built but the trainer."""

    def instantiate_classes(self) -> None:
        """Build family and settings."""
        self.config_init = self.parser.instantiate(self.config)
        self.mixture = self.config_init.data.mixture
        self.horizon = self.config_init.data.schedule.horizon
        self.evaluation: Evaluation = self.config_init.evaluation
        if self.evaluation.shifts and len(self.mixture.members) > 1:
            raise ValueError(
                "evaluation.shifts must be left out for a mixture: each of its families is evaluated by "
                "itself. Evaluate the rule with a configuration of one family and its shifts"
            )

    def comparisons(self) -> Iterator[tuple[str, TaskFamily, int, Evaluation]]:
        """Every family at every horizon, said on the terminal if there are several.

        Yields:
            the name of a folder for it ("" if there is only one), the family, the horizon, and the settings.
        """
        horizons = self.evaluation.each_horizon(self.horizon)
        for member, family in self.mixture.families.items():
            for horizon, settings in horizons.items():
                parts = [member, f"{horizon}-steps" if len(horizons) > 1 else ""]
                name = "/".join(part for part in parts if part)
                if name:
                    print(f"== {name}: {family}")
                yield name, family, horizon, settings


def check_rhythm(max_steps: int, windows_per_epoch: int, windows_per_step: int) -> None:
    """Validation comes at the ends of epochs, so a run must end with one.

    Raises:
        ValueError: if meta-steps would be left over.
    """
    if windows_per_epoch % windows_per_step:
        raise ValueError(
            f"data.windows_per_epoch ({windows_per_epoch}) must be a multiple of "
            f"trainer.accumulate_grad_batches ({windows_per_step}), the windows of one meta-step"
        )
    steps = windows_per_epoch // windows_per_step
    if max_steps > 0 and max_steps % steps:
        of = "data.windows_per_epoch" + (" / accumulate_grad_batches" if windows_per_step > 1 else "")
        raise ValueError(
            f"trainer.max_steps ({max_steps}) must be a multiple of {of} "
            f"({steps}), or the last meta-steps would not be validated; "
            f"{max(max_steps // steps, 1) * steps} is one"
        )
