"""What is asked of Slurm, and the job script that asks for it."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from l2l_scale.checks import check_count

_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")


class Request(NamedTuple):
    """Nodes and how long.

    Args:
        nodes: that train.
        tasks: processes on each.
        gpus: on each.
        cpus: cores of a process.
        sampling_nodes: nodes that only sample.
        sampling_cpus: cores of each of them.
        sampling_partition: where they are.
        array: tasks of an array, as sbatch takes them.
        swept: whether the array's tasks are lines of a file, else they are seeds.
        options: other options of sbatch.
    """

    nodes: int
    tasks: int
    gpus: int
    cpus: int
    sampling_nodes: int
    sampling_cpus: int
    sampling_partition: str | None
    array: str | None
    swept: bool
    options: tuple[str, ...]

    @classmethod
    def of(cls, given: Namespace, lines: int) -> Request:
        """From the command line; ``lines`` of a sweep.

        Raises:
            ValueError: if a number is out of range, or two options exclude each other.
        """
        for name in ("nodes", "cpus_per_task", "sampling_cpus"):
            check_count(name.replace("_", "-"), getattr(given, name))
        for name in ("gpus_per_node", "sampling_nodes"):
            check_count(name.replace("_", "-"), getattr(given, name), least=0)
        tasks = given.gpus_per_node or 1 if given.ntasks_per_node is None else given.ntasks_per_node
        check_count("ntasks-per-node", tasks)
        if given.gpus_per_node and tasks != given.gpus_per_node:
            raise ValueError(
                f"ntasks-per-node ({tasks}) must be gpus-per-node ({given.gpus_per_node}), one process for "
                "each GPU; leave it out"
            )
        if given.seeds is not None and not _ARRAY.fullmatch(given.seeds):
            raise ValueError(f"seeds ({given.seeds}) must be as in 0-7 or 0,3,5 or 0-7%2")
        array = f"0-{lines - 1}" if lines else given.seeds
        if array and given.sampling_nodes:
            raise ValueError(
                "sampling-nodes must be left out of an array of jobs: Slurm has no arrays of jobs of two "
                "components. Submit the runs one by one"
            )
        names = ("time", "partition", "account", "qos", "constraint", "mem")
        options = [f"--{name}={getattr(given, name)}" for name in names if getattr(given, name) is not None]
        return cls(
            nodes=given.nodes,
            tasks=tasks,
            gpus=given.gpus_per_node,
            cpus=given.cpus_per_task,
            sampling_nodes=given.sampling_nodes,
            sampling_cpus=given.sampling_cpus,
            sampling_partition=given.sampling_partition,
            array=array,
            swept=bool(lines),
            options=(*options, *shlex.split(given.sbatch)),
        )

    @property
    def log(self) -> str:
        """Name of the log, as a pattern of Slurm's."""
        return "slurm-%A_%a.log" if self.array else "slurm-%j.log"

    def directives(self, folder: Path) -> list[str]:
        """The ``#SBATCH`` lines."""
        output = str(folder).replace("%", "%%") + f"/{self.log}"
        own = [
            *(f"--job-name={folder.name}", f"--output={output}", f"--chdir={Path.cwd()}"),
            *(f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks}", f"--cpus-per-task={self.cpus}"),
            *([f"--gpus-per-node={self.gpus}"] if self.gpus else []),
            *([f"--array={self.array}"] if self.array else []),
            *self.options,
        ]
        lines = [f"#SBATCH {_quoted(option)}" for option in own]
        if self.sampling_nodes:
            size = f"--nodes={self.sampling_nodes} --ntasks-per-node=1 --cpus-per-task={self.sampling_cpus}"
            common = ("--time=", "--account=", "--qos=", "--partition=")
            of_both = [one for one in self.options if one.startswith(common)]
            if self.sampling_partition:
                of_both.append(f"--partition={self.sampling_partition}")
            lines += ["#SBATCH hetjob", f"#SBATCH {' '.join([size, *map(_quoted, of_both)])}"]
        return lines


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script."""
    return f'"{option}"' if re.search(r"\s", option) else option


def find_templates() -> Path:
    """The folder of the job scripts.

    Raises:
        ValueError: if there is none.
    """
    places = [Path.cwd() / "slurm", Path(__file__).resolve().parents[2] / "slurm"]
    for place in places:
        if (place / "train.sbatch").is_file():
            return place
    raise ValueError(
        f"there are no job scripts in {' or '.join(map(str, places))}; call this in a checkout of l2l_scale, "
        "or copy its folder slurm/ here"
    )


def sweep_lines(file: Path) -> list[str]:
    """The lines of a sweep, without empty ones and comments.

    Raises:
        ValueError: if there are none, or no such file.
    """
    if not file.is_file():
        raise ValueError(f"sweep ({file}) must be a file with options of fit in each line; there is none")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"sweep ({file}) must hold lines with options of fit, as --seed_everything 1")
    return lines


def render(templates: Path, request: Request, folder: Path, arguments: list[str]) -> str:
    """The job script: a template with what is asked for, and where code and environment are.

    Args:
        templates: their folder.
        request: what is asked for.
        folder: of the run; absolute.
        arguments: of ``fit``.
    """
    text = (templates / ("sweep.sbatch" if request.array else "train.sbatch")).read_text(encoding="utf-8")
    lines = text.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    start = lines.index("set -euo pipefail")
    code, environment = folder / "code", Path(sys.executable).parent
    filled = [
        "",
        "# Filled in by l2l-scale slurm: the environment and the code that it was called with.",
        f'export PATH={shlex.quote(str(environment))}:"$PATH"',
        f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"export L2L_SCALE_SLURM={shlex.quote(str(code / 'slurm'))}",
        *([f"export L2L_SCALE_SWEEP={shlex.quote(str(folder / 'sweep.txt'))}"] if request.swept else []),
        f'set -- {shlex.join(arguments)} "$@"',
    ]
    head = [*lines[: last + 1], *request.directives(folder)]
    return "\n".join([*head, *lines[last + 1 : start + 1], *filled, *lines[start + 1 :]]) + "\n"
