"""``l2l-scale evaluate``: learned rules against tuned baselines on held-out tasks."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from l2l_scale.cli.experiment import Reader
from l2l_scale.cli.export import meta_steps_of, read_rule
from l2l_scale.cli.loggers import configured, give_folder, log_reports
from l2l_scale.deploy import classes_of, pretrained_names
from l2l_scale.evaluation import evaluate
from l2l_scale.optimizers import UpdateRule


class Evaluate(Reader):
    """An evaluation of trained rules with a configuration."""

    description = (
        "Tune baselines on tuning tasks, run them and the learned rules on the same held-out tasks, and "
        "write report.json, report.md and curves.png (and pictures.png, where tasks have any). The "
        "configuration is that of fit."
    )

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add what is evaluated and where the report goes."""
        parser.add_argument(
            "--rule",
            type=str | dict[str, str] | None,
            default=None,
            help="an exported rule, a checkpoint, or a pretrained rule's name; several by name: "
            "{LSTM: a.safetensors, paper: runs/b/checkpoints/last}; run_dir's rule.safetensors if not given",
        )
        parser.add_argument(
            "--out",
            type=str | None,
            default=None,
            help="folder of the report; 'evaluation' beside the rule, or in runs/NAME, if not given",
        )

    def before_instantiate_classes(self) -> None:
        """Let a configured logger go on with the run that it logged."""
        if self.config.run_dir or self.config.rule:
            folder = Path(self.config.run_dir) if self.config.run_dir else self.out()
            give_folder(self.config.trainer, folder)

    @property
    def loggers(self) -> list[Logger]:
        """The configured loggers."""
        return configured(self.config_init.trainer.logger)

    def files(self) -> dict[str, Path]:
        """Where the learned rules are, by name.

        Raises:
            ValueError: if neither a rule nor a run folder is given.
        """
        given, run_dir = self.config.rule, self.config.run_dir
        if isinstance(given, dict):
            return {name: Path(path) for name, path in given.items()}
        if given is None and run_dir is None:
            raise ValueError(
                "give --rule, an exported rule or a checkpoint, or the --run_dir of a finished run"
            )
        return {"learned": Path(given) if given else Path(run_dir) / "rule.safetensors"}

    def rules(self) -> dict[str, UpdateRule]:
        """The learned rules by name; they may be of the classes that the configuration names."""
        classes = classes_of(self.config_init.model.rule)
        return {name: read_rule(path, classes) for name, path in self.files().items()}

    def out(self) -> Path:
        """The report's folder."""
        if self.config.out:
            return Path(self.config.out)
        first = next(iter(self.files().values()))
        if not first.exists() and str(first) in pretrained_names():
            return Path("runs") / first / "evaluation"
        return first.parent / "evaluation"


def run(arguments: list[str]) -> None:
    """Evaluate as the command line says."""
    command = Evaluate(arguments)
    rules, out = command.rules(), command.out()
    reports = {}
    for name, family, horizon, settings in command.comparisons():
        folder = out / name
        reports[name] = evaluate(rules, family, horizon, settings, folder), folder
        print(f"report   {folder / 'report.md'}\nnumbers  {folder / 'report.json'}")
        print(f"picture  {folder / 'curves.png'}")
        if family.has_pictures:
            print(f"pictures {folder / 'pictures.png'}")
    if command.loggers:
        log_reports(command.loggers, reports, meta_steps_of(next(iter(command.files().values()))))
