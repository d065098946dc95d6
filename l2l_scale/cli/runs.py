"""``l2l-scale runs``: what runs there are, how far they are, and how to go on with those that ended early."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from l2l_scale.cli.run_list import Run, as_json, find_runs
from l2l_scale.run_record import age

DEFAULT = Path("runs")
SHOWN = 5
"""So many commands are shown that go on with a run; more would hide the table."""
WIDTH = 160
"""Of the table where it is not shown in a terminal."""
STYLES = {
    "running": "green",
    **dict.fromkeys(("stopped", "requeued", "queued", "silent"), "yellow"),
    **dict.fromkeys(("killed", "failed", "unreadable"), "red"),
}


def run(arguments: list[str]) -> None:
    """List as the command line says."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="List run folders: state, last meta-step, best value. killed: the process is gone. "
        "silent: it runs on another host and has said nothing for five minutes. queued: its job waits in "
        "SLURM's queue. new: not started yet. unknown: the folder has no run.json.",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options")
    parser.add_argument(
        "folders", nargs="*", type=str, help=f"run folders, or folders above them; {DEFAULT} if not given"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--sort",
        type=Literal["updated", "name", "best"],
        default="updated",
        help="updated: the latest first; best: by the best value, as the metric's mode says",
    )
    config = parser.parse_args(arguments)
    folders = [Path(folder) for folder in config.folders]
    if not folders and DEFAULT.is_dir():
        folders = [DEFAULT]
    runs = sorted(find_runs(folders), key=ORDERS[config.sort])
    if config.json:
        print(json.dumps([as_json(run) for run in runs], indent=2, ensure_ascii=False))
    elif runs:
        show(runs)
    else:
        print(f"no run folders in {', '.join(map(str, folders or [DEFAULT]))}; l2l-scale fit makes them")


def by_update(run: Run) -> tuple[float, str]:
    """The latest first; last what has not started."""
    return age(run.updated) if run.updated else float("inf"), run.name


def by_best(run: Run) -> tuple[float, str]:
    """The best first; last what has no value yet."""
    if run.best is None:
        return float("inf"), run.name
    return run.best["value"] * (1 if run.mode == "min" else -1), run.name


ORDERS: dict[str, Callable[[Run], tuple[Any, ...]]] = {
    "updated": by_update,
    "name": lambda run: (run.name,),
    "best": by_best,
}


def show(runs: list[Run]) -> None:
    """Print the table and what is to be done."""
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(table(runs))
    for one in runs:
        if one.message and one.state in ("failed", "unreadable"):
            log = f" (log: {one.log})" if one.log else ""
            print(f"{one.name} {one.state}: {one.message}{log}")
    commands = [command for one in runs if (command := one.resume)]
    if commands:
        print("to go on with what ended early (l2l-scale fit -c RUN/config.yaml --ckpt_path last):")
        print("\n".join(f"  {command}" for command in commands[:SHOWN]))
        if len(commands) > SHOWN:
            print(f"  … and {len(commands) - SHOWN} more")


def table(runs: list[Run]) -> Table:
    """One row a run."""
    with_jobs = any(run.slurm_job for run in runs)
    result = Table(box=SIMPLE_HEAD)
    result.add_column("run", overflow="fold")
    result.add_column("state")
    for name in ("meta-step", "best"):
        result.add_column(name, justify="right")
    for name in ("monitor", "started", "updated", *(["SLURM job"] if with_jobs else []), "host"):
        result.add_column(name, overflow="fold")
    for one in runs:
        jobs = [one.slurm_job or ""] if with_jobs else []
        state = Text(one.state, style=STYLES.get(one.state, ""))
        ages = [ago(age(moment)) if moment else "" for moment in (one.started, one.updated)]
        result.add_row(one.name, state, progress(one), best(one), one.monitor, *ages, *jobs, one.host)
    return result


def progress(run: Run) -> str:
    """``50 / 200 (25 %)``."""
    if run.meta_step is None:
        return "" if run.max_steps is None else f"– / {run.max_steps:,}"
    if run.max_steps is None or run.max_steps <= 0:
        return f"{run.meta_step:,}"
    return f"{run.meta_step:,} / {run.max_steps:,} ({run.meta_step / run.max_steps:.0%})"


def best(run: Run) -> str:
    """``21.7 @ 50``: the value and its meta-step."""
    return "" if run.best is None else f"{run.best['value']:.4g} @ {run.best['meta_step']:,}"


def ago(seconds: float) -> str:
    """``3 min ago``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
