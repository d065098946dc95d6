"""``l2l-scale slurm``: check a configuration, snapshot code, and submit a training to Slurm."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import NoReturn

from l2l_scale.cli.experiment import check_rhythm
from l2l_scale.cli.fit import Fit
from l2l_scale.cli.run_folder import RUN_DIR_VARIABLE
from l2l_scale.cli.slurm_script import Request, find_templates, render, sweep_lines
from l2l_scale.cli.snapshot import take_snapshot

KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
"""Variables of Slurm that sbatch needs; the others are of a job that this is called in."""


class Plan(Fit):
    """A training that will run elsewhere: everything is checked and built but the trainer."""

    def instantiate_classes(self) -> None:
        """Build family, rule and data."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule, self.model = self.config_init.data, self.config_init.model

    def write_config(self, path: Path) -> None:
        """Write the configuration for the job."""
        text = self.parser.dump(self.saved_config(), skip_none=False, skip_validation=True)
        path.write_text(text, encoding="utf-8")

    def check(self, request: Request) -> None:
        """Refuse what ``fit`` would refuse in the job, after waiting in the queue.

        Raises:
            ValueError: if slots, rhythm, actors or the trainer's settings do not fit.
        """
        trainer, ranks = self.config.trainer, request.nodes * request.tasks
        if self.config.overwrite:
            raise ValueError(
                "overwrite (true) would delete the run whenever the job starts again; delete the folder "
                "yourself, or choose another run_dir"
            )
        if self.config.ckpt_path not in (None, "last"):
            raise ValueError(
                f"ckpt_path ({self.config.ckpt_path}) must be left out, or last: a job always goes on from "
                "the last checkpoint of its run_dir"
            )
        for name, given, number in (
            ("devices", trainer.devices, request.tasks),
            ("num_nodes", trainer.num_nodes, request.nodes),
        ):
            if given not in (1, "1", -1, "-1", "auto", number, str(number)):
                raise ValueError(
                    f"trainer.{name} ({given}) must be {number}, as --nodes and --ntasks-per-node (or "
                    "--gpus-per-node) say, or be left out"
                )
        if trainer.accelerator in ("gpu", "cuda") and request.gpus == 0:
            raise ValueError(
                f"trainer.accelerator ({trainer.accelerator}) needs GPUs; give --gpus-per-node, or auto"
            )
        check_rhythm(
            trainer.max_steps, self.datamodule.windows_per_epoch, trainer.accumulate_grad_batches or 1
        )
        self.datamodule.seats(0, ranks)  # raises where the slots do not fit
        pool = self.datamodule.pool
        if request.sampling_nodes:
            cpus = request.sampling_nodes * request.sampling_cpus
            pool.check_cpus(ranks, cpus, "of the sampling nodes")
            if cpus < ranks:
                raise ValueError(
                    f"sampling-nodes ({request.sampling_nodes}) × sampling-cpus ({request.sampling_cpus}) "
                    f"must be one CPU for each of the {ranks} ranks at least"
                )
        elif pool.num_actors and pool.ray_address is None:
            pool.check_cpus(request.tasks, request.tasks * request.cpus, "of a node (--cpus-per-task)")


class Parser(ArgumentParser):
    """One that raises instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        """Raise ``ValueError``."""
        raise ValueError(message)


def options() -> Parser:
    """The command's own options; all others are those of ``fit``."""
    parser = Parser(
        prog="l2l-scale slurm",
        usage="l2l-scale slurm CONFIG [-c MORE.yaml …] [--run_dir runs/x] [options] [options of fit]",
        description="Submit a meta-training to Slurm. The configuration is checked first. The run folder "
        "gets config.yaml, a snapshot of the code (code/), the job script and its log; it must be on a file "
        "system that all nodes share, and so must the Python environment and the data.",
        epilog="All other options are those of fit (l2l-scale fit --help). Without --run_dir it is a new "
        "runs/CONFIG[-n].",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="that train (1)")
    add("--gpus-per-node", type=int, default=0, help="one process for each; without GPUs one on a node (0)")
    add("--ntasks-per-node", type=int, help="processes of a node without GPUs (1)")
    add("--cpus-per-task", type=int, default=1, help="CPU cores of a process (1)")
    add("--time", help="limit, as 8:00:00; the run is saved and requeued before, as often as it takes")
    for name in ("partition", "account", "qos", "constraint", "mem"):
        add(f"--{name}", help="as of sbatch")
    add("--sbatch", default="", metavar='"OPTIONS"', help="more options of sbatch")
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--seeds", help="one job for each, as 0-7 or 0-7%%2 (two at a time); in RUN_DIR-SEED"
    )
    several.add_argument("--sweep", type=Path, metavar="FILE", help="one job for each line of options of fit")
    add("--sampling-nodes", type=int, default=0, help="nodes without GPUs that draw windows, through Ray (0)")
    add("--sampling-cpus", type=int, default=1, help="CPU cores of each of them (1)")
    add("--sampling-partition", metavar="PARTITION", help="where they are; that of --partition if not given")
    add("--dry-run", action="store_true", help="show script and command, write and submit nothing")
    return parser


def read(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The command's options, and those of ``fit``.

    Raises:
        ValueError: if no configuration is given.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["-c", *arguments]
    own, rest = options().parse_known_args(arguments)
    if "-c" not in rest and not any(one.startswith("--config") for one in rest):
        raise ValueError("name a configuration: l2l-scale slurm configs/quadratic_lstm.yaml --nodes 2 …")
    return own, rest


def config_of(folder: Path, request: Request) -> Path:
    """Where the configuration is. That of an array is none of a run: its runs have folders of their own."""
    return folder / ("sweep.yaml" if request.array else "config.yaml")


def job_arguments(plan: Plan, request: Request) -> list[str]:
    """What ``fit`` gets in a job; the configuration holds the rest."""
    folder, sampling = plan.folder.resolve(), request.sampling_nodes
    arguments = ["-c", str(config_of(folder, request)), "--run_dir", str(folder)]
    if not plan.config.check_memory:
        arguments += ["--check_memory", "false"]
    if sampling and plan.datamodule.pool.num_actors:  # else the script takes as many as there are CPUs
        arguments += ["--data.pool.num_actors", str(plan.datamodule.pool.num_actors)]
    return arguments


def run(arguments: list[str]) -> None:
    """Submit as the command line says.

    Raises:
        ValueError: if the configuration or the request cannot work, or there is no ``sbatch``.
    """
    own, rest = read(arguments)
    lines = sweep_lines(own.sweep) if own.sweep else []
    request = Request.of(own, len(lines))
    templates = find_templates()
    for line in lines:
        Plan([*rest, *shlex.split(line)]).check(request)
    plan = Plan(rest)
    plan.check(request)
    folder = plan.folder.resolve()
    script = render(templates, request, folder, job_arguments(plan, request))
    if own.dry_run:
        print(f"{script}\n# {folder / 'job.sbatch'}; to be submitted by:\nsbatch {folder / 'job.sbatch'}")
        return
    if shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch on this machine: call this where jobs are submitted, or look at what would "
            "be submitted with --dry-run"
        )
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_config(config_of(folder, request))
    take_snapshot(folder / "code", templates)
    if lines:
        (folder / "sweep.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "job.sbatch").write_text(script, encoding="utf-8")
    try:
        job = submit(folder / "job.sbatch")
    except RuntimeError:
        if not existed:
            shutil.rmtree(folder)  # else the next try finds a folder that is not empty
        raise
    print(farewell(job, folder, request))


def submit(script: Path) -> str:
    """The id of the job.

    Raises:
        RuntimeError: if Slurm does not take it.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or not (name.startswith("SLURM_") or name == RUN_DIR_VARIABLE)
    }
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"Slurm did not take the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def farewell(job: str, folder: Path, request: Request) -> str:
    """How to follow a job."""
    log = folder / request.log.replace("%j", job).replace("%A", job).replace("%a", "*")
    rows = {
        f"job {job}": str(folder),
        "log": str(log),
        "follow": f"tail -F {log}",
        "queue": f"squeue -j {job}",
        "stop": f"scancel {job}",
        "runs": "l2l-scale runs",
    }
    return "\n".join(f"{name:12}{text}" for name, text in rows.items())
