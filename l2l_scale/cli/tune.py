"""``l2l-scale tune``: tune the baselines of a configuration."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from l2l_scale.cli.experiment import Reader
from l2l_scale.evaluation import tune_baselines


class Tune(Reader):
    """Tuning with a configuration."""

    description = (
        "Tune the baselines on the tuning tasks of a configuration, for its horizon, and show what was "
        "chosen. Results are kept, and evaluate uses them."
    )

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add where the result goes."""
        parser.add_argument(
            "--out", type=str | None, default=None, help="folder for tuning.json; none if not given"
        )


def run(arguments: list[str]) -> None:
    """Tune as the command line says."""
    command = Tune(arguments)
    out = Path(command.config.out) if command.config.out else None
    for name, family, horizon, settings in command.comparisons():
        tune_baselines(family, horizon, settings, out and out / name)
