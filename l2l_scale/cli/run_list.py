"""Finds run folders and says how each run is, from its files and, where that helps, from SLURM's queue."""

from __future__ import annotations

import csv
import math
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from l2l_scale.run_record import RUN_FILE, Best, RunRecord, age, is_alive, read_record

DEPTH = 5
"""So many folders below a given one are searched: sweeps nest."""
SILENT = 300.0
"""Seconds without a word after which a run on another host is not believed to run."""
RESUMABLE = ("killed", "stopped", "silent", "failed")
_INSIDE = {"checkpoints", "code", "diagnosis", "evaluation", "wandb"}
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING"}


class Run(NamedTuple):
    """What is known of a run; None where it is not."""

    name: str
    folder: Path
    state: str
    message: str | None = None
    meta_step: int | None = None
    max_steps: int | None = None
    monitor: str | None = None
    mode: str = "min"
    best: Best | None = None
    started: str | None = None
    updated: str | None = None
    starts: int | None = None
    slurm_job: str | None = None
    host: str | None = None
    log: str | None = None

    @property
    def resume(self) -> str | None:
        """The command that goes on with a run that ended early; None for others."""
        if self.state not in RESUMABLE:
            return None
        return f"l2l-scale fit -c {shlex.quote(str(self.folder / 'config.yaml'))} --ckpt_path last"


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in and below some folders, each once.

    Raises:
        ValueError: if a folder is not there.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"FOLDER ({folder}): there is no such folder; give a run folder or one above run folders"
            )
        for path in _run_folders(folder, DEPTH, set()):
            whole = len(folders) > 1 or path == folder  # else two could have one name, or one none
            name = str(path if whole else path.relative_to(folder))
            found.setdefault(path.resolve(), read_run(name, path))
    return ask_slurm(list(found.values()))


def _run_folders(folder: Path, depth: int, seen: set[Path]) -> Iterator[Path]:
    """Run folders, the given one among them; through links too, but nowhere twice."""
    if (real := folder.resolve()) in seen:
        return
    seen.add(real)
    if is_run(folder):
        yield folder
    with suppress(OSError):  # a folder that may not be read has no runs for us
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
        for path in inner if depth else ():
            if path.name not in _INSIDE and not path.name.startswith("."):
                yield from _run_folders(path, depth - 1, seen)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: W&B and other programs write a config.yaml too."""
    if (folder / RUN_FILE).exists():
        return True
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return re.search(r"^run_dir:", text, re.MULTILINE) is not None


def read_run(name: str, folder: Path) -> Run:
    """What a run folder says."""
    try:
        record = read_record(folder)
    except FileNotFoundError:
        return _without_record(name, folder)
    except (OSError, ValueError) as error:
        return Run(name, folder, "unreadable", f"{RUN_FILE}: {error}")
    known = {key: value for key, value in record.items() if key in Run._fields}
    return Run(**{**known, "name": name, "folder": folder, "state": state_of(record)})  # type: ignore[arg-type]


def state_of(record: RunRecord) -> str:
    """The state that the file tells, unless the process that should be running is not."""
    if record["state"] != "running":
        return record["state"]
    if record["host"] == socket.gethostname():
        return "running" if is_alive(record["pid"], record["process_started"]) else "killed"
    return "silent" if age(record["updated"]) > SILENT else "running"


def _without_record(name: str, folder: Path) -> Run:
    """A run that has not started yet, or was made before there was a run.json."""
    try:
        config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        checkpoint = config["checkpoint"]
        monitor, mode, max_steps = checkpoint["monitor"], checkpoint["mode"], config["trainer"]["max_steps"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return Run(name, folder, "unreadable", " ".join(f"config.yaml: {error}".split()))
    rule, others = folder / "rule.safetensors", [*folder.glob("metrics.csv"), *folder.glob("checkpoints/*")]
    written = [path.stat().st_mtime for path in (rule, *others) if path.exists()]
    state = "unknown" if written else "new"
    if rule.exists() and rule.stat().st_mtime >= max(written):
        state = "finished"  # the rule is exported at the end
    meta_step, best = _from_metrics(folder, monitor, mode)
    moment = (
        datetime.fromtimestamp(max(written), timezone.utc).isoformat(timespec="seconds") if written else None
    )
    return Run(
        name,
        folder,
        state,
        meta_step=meta_step,
        max_steps=max_steps,
        monitor=monitor,
        mode=mode,
        best=best,
        updated=moment,
    )


def _from_metrics(folder: Path, monitor: str | None, mode: str) -> tuple[int | None, Best | None]:
    """The last meta-step and the best value that were logged, also before the run was resumed."""
    steps: list[int] = []
    values: list[tuple[float, int]] = []
    for path in folder.glob("metrics*.csv"):
        with suppress(OSError, ValueError, csv.Error), path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                steps.append(int(row["step"]))
                if monitor and row.get(monitor) and math.isfinite(float(row[monitor])):
                    values.append((float(row[monitor]), steps[-1]))
    best = None
    if monitor and values:
        value, step = min(values) if mode == "min" else max(values)
        best = Best(monitor=monitor, value=value, meta_step=step)
    return max(steps, default=None), best


def ask_slurm(runs: list[Run]) -> list[Run]:
    """Correct the states of runs that ended without a word or wait to be started again."""
    jobs = {run.slurm_job for run in runs if run.slurm_job and run.state in ("killed", "silent", "requeued")}
    queue = squeue(sorted(jobs)) if jobs else {}
    return [
        run._replace(state="queued")
        if run.slurm_job in jobs and queue.get(run.slurm_job or "") in _WAITING
        else run
        for run in runs
    ]


def squeue(jobs: list[str]) -> dict[str, str]:
    """The states of those jobs that are in SLURM's queue; empty where it cannot be asked."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(jobs)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(pair for line in done.stdout.splitlines() if len(pair := line.split(maxsplit=1)) == 2)


def as_json(run: Run) -> dict[str, Any]:
    """All that is known of a run, with the command that goes on with it."""
    return {**run._asdict(), "folder": os.fspath(run.folder), "resume": run.resume}
