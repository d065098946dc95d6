"""``l2l-scale evaluate``: learned rules against tuned baselines on held-out tasks."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from l2l_scale.cli.experiment import Reader
from l2l_scale.cli.export import read_rule
from l2l_scale.evaluation import evaluate
from l2l_scale.optimizers import UpdateRule


class Evaluate(Reader):
    """An evaluation of trained rules with a configuration."""

    description = (
        "Tune baselines on tuning tasks, run them and the learned rules on the same held-out tasks, and write "
        "report.json, report.md and curves.png. The configuration is that of fit."
    )

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add what is evaluated and where the report goes."""
        parser.add_argument(
            "--rule",
            type=str | dict[str, str],
            help="an exported rule or a checkpoint; or several by name: {LSTM: a.safetensors, paper: b.ckpt}",
        )
        parser.add_argument(
            "--out", type=str | None, default=None, help="folder of the report; 'evaluation' beside the rule if not given"
        )

    def rules(self) -> dict[str, UpdateRule]:
        """The learned rules by name; the class of the configuration's rule may be one of the user's own."""
        files = self.config.rule
        if files is None:
            raise ValueError("--rule is missing: give a run's rule.safetensors or a checkpoint")
        named = files if isinstance(files, dict) else {"learned": files}
        return {name: read_rule(Path(path), own=self.config_init.model.rule) for name, path in named.items()}

    def out(self) -> Path:
        """The report's folder."""
        if self.config.out:
            return Path(self.config.out)
        files = self.config.rule
        first = next(iter(files.values())) if isinstance(files, dict) else files
        return Path(first).parent / "evaluation"


def run(arguments: list[str]) -> None:
    """Evaluate as the command line says."""
    command = Evaluate(arguments)
    rules, out = command.rules(), command.out()
    evaluate(rules, command.family, command.horizon, command.evaluation, out)
    print(f"report   {out / 'report.md'}\nnumbers  {out / 'report.json'}\npicture  {out / 'curves.png'}")
