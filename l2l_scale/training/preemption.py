"""Stopping a run in good order: a signal or a time limit is noted, and heeded at the next window boundary."""

from __future__ import annotations

import signal
import threading
import time
from enum import IntEnum
from types import FrameType
from typing import Any

from l2l_scale.training.slurm_job import SlurmJob

ASK_AGAIN = 60.0
"""Seconds after which SLURM is asked again when a job ends: limits can be extended."""
MARGIN = 30.0
"""Seconds that are left for what comes after the last checkpoint."""


class Reason(IntEnum):
    """Why a run is stopped. Ranks agree on the largest."""

    NONE = 0
    INTERRUPT = 1
    """Ctrl-C."""
    TIME_LIMIT = 2
    """SLURM's, which is about to end the job."""
    USR1 = 3
    """What SLURM sends before a time limit."""
    TERM = 4
    """What is sent on preemption, on requeueing, and by ``kill``."""

    @property
    def text(self) -> str:
        """For people."""
        return {0: "nothing", 1: "Ctrl-C", 2: "the time limit", 3: "SIGUSR1", 4: "SIGTERM"}[self.value]


SIGNALS = {signal.SIGINT: Reason.INTERRUPT, signal.SIGUSR1: Reason.USR1, signal.SIGTERM: Reason.TERM}


class Stopped(Exception):  # noqa: N818 - it is no error
    """Raised on all ranks at one window boundary, after a checkpoint was written."""

    def __init__(self, reason: Reason, checkpoint: str) -> None:
        super().__init__(f"stopped by {reason.text}; saved as {checkpoint}")
        self.reason, self.checkpoint = reason, checkpoint


class Interruption:
    """Notes signals while a run trains. A second Ctrl-C ends it at once.

    Args:
        job: the SLURM job whose time limit counts.
    """

    def __init__(self, job: SlurmJob | None = None) -> None:
        self.job = job
        self.noted = Reason.NONE
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}
        self._ends_at: float | None = None
        self._asked_at: float | None = None
        self._boundary_at: float | None = None
        self._longest = 0.0

    def install(self) -> None:
        """Put the handlers in their places. They only set a flag: anything else could meet a collective."""
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._note)

    def restore(self, stopped: bool = False) -> None:
        """Give back the handlers that were there before.

        Args:
            stopped: the run has been saved and ends: SIGTERM and SIGUSR1 have nothing more to say to it, but
                would kill it before it has queued its job again.
        """
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                ignored = stopped and number != signal.SIGINT
                signal.signal(number, signal.SIG_IGN if ignored else handler)
        self._before = {}

    def reason(self, seconds_to_save: float) -> Reason:
        """Whether this process has a reason to stop; to be asked at every boundary.

        Args:
            seconds_to_save: how long the last checkpoint took.
        """
        now = time.time()
        if self._boundary_at is not None:
            self._longest = max(self._longest, now - self._boundary_at)
        self._boundary_at = now
        if self.noted is Reason.NONE and self._is_late(now, seconds_to_save):
            self.noted = Reason.TIME_LIMIT
        return self.noted

    def _is_late(self, now: float, seconds_to_save: float) -> bool:
        """Whether another window, be it with a validation, might not fit before the time limit."""
        if self.job is None:
            return False
        needed = 1.5 * self._longest + 2 * seconds_to_save + MARGIN
        asked_long_ago = self._asked_at is None or now - self._asked_at > ASK_AGAIN
        if asked_long_ago or (self._ends_at is not None and now + needed > self._ends_at):
            self._ends_at, self._asked_at = self.job.end_time(), now
        return self._ends_at is not None and now + needed > self._ends_at

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            print("\nstopping after this window, with a checkpoint; Ctrl-C again ends at once", flush=True)
        self.noted = max(self.noted, SIGNALS[signal.Signals(number)])
