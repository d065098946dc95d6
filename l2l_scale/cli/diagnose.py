"""``l2l-scale diagnose``: what is wrong with a meta-learner, with a picture and advice."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from l2l_scale.cli.experiment import Reader
from l2l_scale.cli.export import find_class, meta_steps_of, read_rule
from l2l_scale.cli.run_list import is_run
from l2l_scale.cores import available_cores
from l2l_scale.deploy import classes_of
from l2l_scale.diagnosis import Diagnosis, Finding, Subject, diagnose
from l2l_scale.diagnosis.course import read_course
from l2l_scale.diagnosis.diagnose import Run
from l2l_scale.diagnosis.picture import draw
from l2l_scale.diagnosis.report import write_report
from l2l_scale.evaluation.jobs import Runner, progress_display
from l2l_scale.optimizers import UpdateRule
from l2l_scale.rng import Split
from l2l_scale.training.checkpoints.shelf import LAST, has_checkpoint

STYLES = {"problem": "bold red", "look": "yellow", "ok": "green"}
WIDTH = 140
"""Of the table where it is not shown in a terminal."""
FEW = 40_000
"""Coordinates of all tasks together, if the number of tasks is not given."""
QUICK = 2_000_000
"""Updates of coordinates, on all tasks together, for which one process is enough."""


class RunConfig(Reader):
    """The configuration of a run, as fit wrote it."""

    description = "The configuration of a run."

    def add_options(self, parser: LightningArgumentParser) -> None:
        """None of its own."""

    def subjects(self, rule: UpdateRule, split: Split, num_tasks: int | None) -> dict[str, Subject]:
        """The rule on every family of the run."""
        model, data = self.config_init.model, self.config_init.data
        slots = self.mixture.slots(data.slots)
        windows = self.config.trainer.accumulate_grad_batches
        return {
            name: Subject(
                rule=rule,
                family=family,
                schedule=data.schedule,
                estimator=model.estimator,
                seed=data.seed,
                split=split,
                num_tasks=num_tasks or default_tasks(family.spec.size),
                slots_per_meta_step=len(slots[name]) * windows,
                backend="eager" if model.backend in ("eager", "compiled") else "auto",
                teacher=data.teacher,
            )
            for name, family in self.mixture.families.items()
        }

    def run(self, folder: Path) -> Run:
        """The run's course, and what its findings need of the settings."""
        checkpoint, clip = self.config.checkpoint, self.config.trainer.gradient_clip_val
        return Run(read_course(folder), checkpoint.monitor, checkpoint.mode, clip)


def run(arguments: list[str]) -> None:
    """Diagnose as the command line says."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Explain how a meta-learner does: meta-gradients by phase, divergence, saturation, sizes "
        "of updates, sensitivity, imitation of a teacher, and the course of the run. The rule of the last "
        "checkpoint is looked at, or rule.safetensors where there is none. Writes diagnosis.png, "
        "diagnosis.md and diagnosis.json.",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument(
        "--rule", type=str | None, default=None, help="look at this exported rule or checkpoint instead"
    )
    parser.add_argument(
        "--tasks",
        type=PositiveInt | None,
        default=None,
        help="how many tasks of each family; if not given 8, or fewer of more than 5,000 coordinates",
    )
    parser.add_argument(
        "--split",
        type=Literal["valid", "train"],
        default="valid",
        help="held-out tasks, or those of training",
    )
    parser.add_argument(
        "--num_workers",
        type=PositiveInt | None,
        default=None,
        help="processes; one per CPU core if not given, or only this one where that is quick",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder to write; RUN/diagnosis if not given"
    )
    parser.add_argument(
        "--classes", type=list[str], default=[], help="your own classes of another --rule: [my.Rule]"
    )
    options = parser.parse_args(arguments)
    folder = Path(options.run)
    check_run(folder)
    source = rule_of(folder) if options.rule is None else Path(options.rule)
    config = RunConfig(["-c", str(folder / "config.yaml")])
    classes = [*classes_of(config.config_init.model.rule), *map(find_class, options.classes)]
    rule = read_rule(source, classes)
    split = Split.TRAIN if options.split == "train" else Split.VALID
    subjects, about = config.subjects(rule, split, options.tasks), config.run(folder)
    workers = options.num_workers or default_workers(subjects.values())
    with progress_display() as progress:
        diagnosis = diagnose(subjects, about, Runner(workers, progress))
    settings = describe(folder, source, subjects, config, options)
    out = Path(options.out) if options.out else folder / "diagnosis"
    pictures = write(diagnosis, about, settings, out)
    show(diagnosis, settings)
    print(f"report   {out / 'diagnosis.md'}\nnumbers  {out / 'diagnosis.json'}")
    for picture in pictures:
        print(f"picture  {out / picture}")


def default_tasks(size: int) -> int:
    """Fewer tasks the more coordinates they have; two at least, to see a spread."""
    return min(max(FEW // size, 2), 8)


def default_workers(subjects: Iterable[Subject]) -> int:
    """One per core; one in all where starting others takes longer than the work."""
    return available_cores() if sum(subject.work for subject in subjects) > QUICK else 1


def check_run(folder: Path) -> None:
    """Raise ``ValueError`` unless a folder is a run's."""
    if not folder.is_dir():
        raise ValueError(f"RUN ({folder}): there is no such folder; `l2l-scale runs` lists run folders")
    if not is_run(folder) or not (folder / "config.yaml").is_file():
        raise ValueError(
            f"RUN ({folder}) is no run folder: it has no config.yaml of `l2l-scale fit`; `l2l-scale runs "
            f"{folder}` lists those below it"
        )


def rule_of(folder: Path) -> Path:
    """Where a run's rule is: its last checkpoint, or the exported rule where there is none.

    Raises:
        ValueError: if it has neither.
    """
    if has_checkpoint(folder / "checkpoints"):
        return folder / "checkpoints" / LAST
    exported = folder / "rule.safetensors"
    if not exported.is_file():
        raise ValueError(
            f"RUN ({folder}) has neither a checkpoint nor rule.safetensors yet; go on with "
            f"`l2l-scale fit -c {folder / 'config.yaml'} --ckpt_path last`, or give --rule"
        )
    return exported


def describe(
    folder: Path, source: Path, subjects: dict[str, Subject], config: RunConfig, options: Any
) -> dict[str, Any]:
    """What was looked at, for the head of the report."""
    rule = next(iter(subjects.values())).rule
    counts = " + ".join(str(subject.num_tasks) for subject in subjects.values())
    schedule, steps = config.config_init.data.schedule, meta_steps_of(source)
    return {
        "run": str(folder),
        "rule": f"{type(rule).__name__}, {sum(param.numel() for param in rule.parameters()):,} parameters",
        "read from": str(source) + ("" if steps is None else f", {steps:,} meta-steps"),
        "looked at": f"{counts} {options.split} tasks, {schedule.horizon} inner steps "
        f"in windows of {schedule.window}",
    }


def write(diagnosis: Diagnosis, run: Run, settings: dict[str, Any], out: Path) -> list[str]:
    """Write report and pictures; the names of the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    names = {name: f"diagnosis-{name}.png" if name else "diagnosis.png" for name in diagnosis.examinations}
    for name, one in diagnosis.examinations.items():
        title = f"{settings['run']}: {settings['rule']}, on {name or one.family}"
        draw(one, run.course, run.monitor, title, out / names[name])
    write_report(diagnosis, settings, names, out)
    return list(names.values())


def show(diagnosis: Diagnosis, settings: dict[str, Any]) -> None:
    """Print the findings, the worst first."""
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print("\n".join(f"{name}: {value}" for name, value in settings.items()))
    families = len(diagnosis.examinations) > 1
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "about", *(["family"] if families else [])):
        table.add_column(name, no_wrap=True)
    for name in ("what was seen", "what helps"):
        table.add_column(name, overflow="fold", ratio=1)
    for finding in diagnosis.findings:
        table.add_row(*_row(finding, families))
    console.print(table)


def _row(finding: Finding, families: bool) -> list[Text]:
    severity = Text(finding.severity, style=STYLES[finding.severity])
    family = [finding.family] if families else []
    return [severity, *map(Text, (finding.subject, *family, finding.text, finding.advice))]
