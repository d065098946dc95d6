"""The Slurm job that this process runs in: what slurmctld says of it, and how to queue it again."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

ANSWER_SECONDS = 30.0
"""How long slurmctld may take to answer: it is asked when little time is left."""


class SlurmJob(NamedTuple):
    """A job of Slurm.

    Args:
        id: what ``scontrol`` calls it: JOBID, ARRAYJOBID_TASKID for a task of an array, and the first
            component's id for a heterogeneous job, which is requeued as a whole.
    """

    id: str

    @classmethod
    def current(cls, environ: Mapping[str, str] = os.environ) -> SlurmJob | None:
        """The job that this process runs in; None outside of Slurm."""
        if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
            return cls(f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}")
        # A component of a heterogeneous job has an id of its own, which cannot be requeued.
        number = environ.get("SLURM_HET_JOB_ID") or environ.get("SLURM_JOB_ID")
        return cls(number) if number else None

    def state(self) -> str | None:
        """Its state, as RUNNING or COMPLETING; None if slurmctld does not say."""
        return _value(self._shown(), "JobState")

    def requeueable(self) -> bool:
        """Whether it may be put back into the queue: neither ``--no-requeue`` nor JobRequeue=0 say no."""
        return _value(self._shown(), "Requeue") == "1"

    def end_time(self) -> float | None:
        """When its time limit ends it, in Unix seconds; None if that is not known, or never.

        Asks slurmctld first, for the limit may have been changed since the job began.
        """
        shown = self._shown()
        if _value(shown, "TimeLimit") == "UNLIMITED":
            return None
        for text in (_value(shown, "EndTime"), os.environ.get("SLURM_JOB_END_TIME")):
            if text and text.isdigit():
                return float(text)
        return None

    def log(self) -> str | None:
        """Where its output goes; None if slurmctld does not say. The path may have spaces."""
        found = re.search(r"^ +StdOut=(.+)$", self._shown(), re.MULTILINE)
        return found[1].strip() if found else None

    def requeue(self) -> bool:
        """Put it back into the queue, if it is running; whether that was done.

        A job that ``scancel`` ends must not come back, and one that slurmctld requeues itself needs no help:
        neither is RUNNING any more. This process is killed soon after.
        """
        shown = self._shown()
        if _value(shown, "JobState") != "RUNNING" or _value(shown, "Requeue") != "1":
            return False
        return _scontrol("requeue", self.id) is not None

    def _shown(self) -> str:
        return _scontrol("show", "job", self.id) or ""


def _scontrol(*arguments: str) -> str | None:
    """What scontrol prints; None if it fails, hangs or is missing."""
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}  # Unix seconds, whatever the user prefers
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _value(shown: str, key: str) -> str | None:
    """A value of ``scontrol show job``; of the first component where there are several.

    Only indented lines count: the first one holds the job's name, in which anything can stand.
    """
    found = re.search(rf"^ +(?:\S+ +)*?{key}=(\S+)", shown, re.MULTILINE)
    return found[1] if found else None
