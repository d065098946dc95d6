"""Where metrics go: always to metrics.csv, and to whatever ``trainer.logger`` names besides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger

from l2l_scale.deploy.files import read_header
from l2l_scale.evaluation import Report
from l2l_scale.evaluation.settings import HELD_OUT
from l2l_scale.training import WandbRun


def give_folder(trainer: Namespace, folder: Path) -> None:
    """Let configured loggers that have no folder write into the run folder."""
    for arguments in _arguments(trainer):
        if "save_dir" in arguments and arguments["save_dir"] is None:
            arguments["save_dir"] = str(folder)


def take_folder(trainer: Namespace, folder: Path) -> None:
    """Undo :func:`give_folder`: a run from a saved configuration must not write into this folder."""
    for arguments in _arguments(trainer):
        if arguments.get("save_dir") == str(folder):
            arguments["save_dir"] = None


def _arguments(trainer: Namespace) -> list[Any]:
    """The constructor arguments of the configured loggers."""
    given = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    return [one.init_args for one in given if isinstance(one, Namespace) and "init_args" in one]


def configured(logger: Logger | list[Logger] | bool | None) -> list[Logger]:
    """The loggers that ``trainer.logger`` names."""
    if isinstance(logger, Logger):
        return [logger]
    return list(logger) if isinstance(logger, list) else []


def all_loggers(logger: Logger | list[Logger] | bool | None, folder: Path) -> list[Logger]:
    """metrics.csv and the configured loggers; none where ``trainer.logger`` is false.

    W&B waits until the run begins, so that a mistake in the configuration starts no run there.
    """
    if logger is False:
        return []
    others = configured(logger)
    for run in wandb_runs(others):
        run.wait()
    return [CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1), *others]


def wandb_runs(loggers: list[Logger]) -> list[WandbRun]:
    """Those of the loggers that log to W&B."""
    return [logger for logger in loggers if isinstance(logger, WandbRun)]


@contextmanager
def ending(loggers: list[Logger]) -> Iterator[None]:
    """End the runs of W&B with what happens inside."""
    failed = 1
    try:
        yield
        failed = 0
    finally:
        for run in wandb_runs(loggers):
            run.finish(failed)


def log_rule(loggers: list[Logger], rule: Path) -> None:
    """Log an exported rule, with what its file says of it."""
    for run in wandb_runs(loggers):
        run.log_files("rule", [rule], read_header(rule)["metadata"])


def log_reports(
    loggers: list[Logger], reports: Mapping[str, tuple[Report, Path]], meta_steps: int | None
) -> None:
    """Log an evaluation after so many meta-steps: pictures, tables and numbers.

    Args:
        loggers: of which those to W&B are meant.
        reports: with their folders, by the family's name in a mixture.
        meta_steps: of the rule, if it is known.
    """
    for run in wandb_runs(loggers):
        run.begin()
        for name, (report, folder) in reports.items():
            suffix, dash = (f"/{name}", f"-{name.replace('/', '-')}") if name else ("", "")
            run.log_image(f"evaluation/curves{suffix}", [str(folder / "curves.png")], meta_steps)
            run.log_table(f"evaluation/losses{suffix}", *losses_in_numbers(report), step=meta_steps)
            run.log_files(f"evaluation{dash}", [folder / "report.json"])
        run.finish()


def losses_in_numbers(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the held-out test, one row an optimizer; None where a number is infinite."""
    optimizers = report["tests"][HELD_OUT]["optimizers"]
    steps = list(next(iter(optimizers.values()))["mean"])
    columns = ["optimizer", "kind", *(f"mean @{t}" for t in steps), *(f"median @{t}" for t in steps)]
    columns += [f"sum 1…{report['horizon']}", "diverged", "tasks", "hyper-parameters"]
    rows: list[list[Any]] = []
    for name, entry in optimizers.items():
        losses = [entry["mean"][t] for t in steps] + [entry["median"][t] for t in steps]
        chosen = json.dumps(entry["hyper_parameters"], ensure_ascii=False)
        row = [name, entry["kind"], *losses, entry["sum_mean"]]
        rows.append([*row, entry["num_diverged"], entry["num_tasks"], chosen])
    return columns, rows
