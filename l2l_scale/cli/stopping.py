"""How a run ends before its end: what is said, whether it is queued again, and its exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from l2l_scale.cli.run_log import say
from l2l_scale.training import Reason, Stopped
from l2l_scale.training.run_state import RunStateFile
from l2l_scale.training.slurm_job import SlurmJob

REQUEUED = 75
"""Exit code of a run that was saved and goes on later by itself (EX_TEMPFAIL)."""
_SIGNALS = {Reason.INTERRUPT: signal.SIGINT, Reason.USR1: signal.SIGUSR1, Reason.TERM: signal.SIGTERM}


def end_with_parent() -> None:
    """Let this process, which Lightning started, not outlive the one that did, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-observer").start()


def leave() -> NoReturn:
    """End a process that has done its part, though the first rank still has something to do.

    Without tidying up: connections that are taken apart in another order can abort a process at its very end,
    and whoever started the ranks would take that for an accident, and kill the first one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def exit_code(reason: Reason, in_slurm: bool) -> int:
    """128 + signal, as shells have it; 75 where SLURM lets the run go on."""
    if reason is Reason.TIME_LIMIT or (in_slurm and reason is not Reason.INTERRUPT):
        return REQUEUED
    return 128 + _SIGNALS[reason]


def stop_here(stop: Stopped, record: RunStateFile, folder: Path) -> NoReturn:
    """Say what happened; let SLURM run the job again; exit.

    All ranks but the first exit with 0: whoever started them would take another code for an accident, and
    kill the first one in the middle of this.
    """
    job = SlurmJob.current()
    code = exit_code(stop.reason, job is not None)
    if record.record is not None:  # rank 0
        say(str(stop))
        if job is None or code != REQUEUED or not _requeue(job, stop, record):
            say(f"to go on: l2l-scale fit -c {folder / 'config.yaml'} --ckpt_path last")
        sys.exit(code)
    leave()


def _requeue(job: SlurmJob, stop: Stopped, record: RunStateFile) -> bool:
    """Queue a job again, which ends it: the very last thing. Whether that was done."""
    record.end("requeued", stop.reason.text)
    say(f"queueing job {job.id} again")
    if job.requeue():
        return True
    record.end("stopped", stop.reason.text)
    say(f"job {job.id} (state {job.state()}) was not queued again by this process")
    return False
