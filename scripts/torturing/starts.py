"""Starts a run in a session of its own, and kills it with all that it started."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from lightning.pytorch.utilities import rank_zero_only

from l2l_scale.cli.main import main

ROOT = Path(__file__).parents[2]
_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_GRACE = 30.0
"""Seconds in which the processes of a run that has ended must be gone."""


class Setting(NamedTuple):
    """What is started."""

    ranks: int
    actors: int
    meta_steps: int
    fresh: bool

    def arguments(self, folder: Path, resumes: bool) -> list[str]:
        """The command line of the run in a folder."""
        configs = ["configs/smoke.yaml", *(["configs/overlays/cpu2.yaml"] if self.ranks > 1 else [])]
        options = {
            "run_dir": folder,
            "trainer.max_steps": self.meta_steps,
            "trainer.devices": self.ranks,
            "trainer.enable_progress_bar": "false",
            "data.pool.num_actors": self.actors,
            "checkpoint.every_n_meta_steps": 3,
            "checkpoint.keep_last": 2,
            **({"ckpt_path": "last"} if resumes else {}),
        }
        paths = [part for config in configs for part in ("-c", str(ROOT / config))]
        return [
            "fit",
            *paths,
            *(part for name, value in options.items() for part in (f"--{name}", str(value))),
        ]


class Kill(NamedTuple):
    """A moment."""

    after: float
    """Seconds after the start,"""
    meta_step: int
    """and there is a checkpoint of this meta-step or a later one;"""
    writing: bool
    """and a hidden folder appears among the checkpoints then;"""
    delay: float
    """and so many seconds have passed."""
    stagger: float
    """Longest time between the deaths of two processes; 0: all at once."""


class Ending(NamedTuple):
    """How a start ended."""

    code: int
    """Exit code; the negative signal where it was killed."""
    killed: bool
    seconds: float
    left: int
    """Processes that were still there long after the run had ended by itself."""


def adopt_orphans() -> None:
    """Become the parent of all processes that the runs leave, so that none escapes.

    Raises:
        OSError: if the system does not have that.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become the parent of orphans")


def start(arguments: list[str], setting: Setting, log: Path) -> int:
    """Start a run; its process, which leads a session."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"only a process without threads can be forked safely, and there are {threads}"
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if setting.fresh:
            os.execv(sys.executable, [sys.executable, "-m", "l2l_scale", *arguments])
        code = _command(arguments) if setting.ranks == 1 else _ranks(arguments, setting.ranks)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def watch(leader: int, checkpoints: Path, kill: Kill | None, limit: float) -> Ending:
    """Wait for the end of a run, or kill it.

    Args:
        leader: its process.
        checkpoints: their folder.
        kill: when; None lets it live.
        limit: seconds after which a run hangs; then it is killed too.
    """
    began = time.perf_counter()
    status = _await(leader, checkpoints, kill, limit)
    if status is None and kill is not None:
        if kill.writing:
            status = _await_writing(leader, checkpoints, began + limit)
        moment = time.perf_counter() + kill.delay
        while status is None and time.perf_counter() < moment:
            status = _status(leader)
    killed = status is None
    if killed:
        status = _kill(leader, 0.0 if kill is None else kill.stagger)
    seconds = time.perf_counter() - began
    left = 0 if killed else _wait_for_descendants()
    kill_descendants()
    assert status is not None
    return Ending(os.waitstatus_to_exitcode(status), killed, seconds, left)


def hidden(checkpoints: Path) -> dict[str, int]:
    """Drafts and replaced checkpoints, and their numbers on the disk."""
    try:
        return {entry.name: entry.inode() for entry in os.scandir(checkpoints) if entry.name[:6] == ".step-"}
    except FileNotFoundError:
        return {}


def meta_step(checkpoints: Path) -> int:
    """That of the newest checkpoint; 0 if there is none."""
    try:
        return max(
            (int(entry.name[5:]) for entry in os.scandir(checkpoints) if entry.name[:5] == "step-"), default=0
        )
    except FileNotFoundError:
        return 0


def kill_descendants() -> None:
    """Until there are none: one that dies may just have started another."""
    while left := _living():
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.005)


def _command(arguments: list[str]) -> int:
    """Run it here; the exit code."""
    code: object = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


def _ranks(arguments: list[str], ranks: int) -> int:
    """Fork the ranks, as torchrun would start them; the first exit code that is not 0, if there is one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    for rank in range(ranks):
        if os.fork() == 0:
            own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "torture"}
            os.environ.update({name: str(value) for name, value in {**common, **own}.items()})
            rank_zero_only.rank = rank  # Lightning looked when it was imported
            return _command(arguments)
    for _ in range(ranks):
        code = os.waitstatus_to_exitcode(os.wait()[1])
        if code != 0:
            return code & 0xFF
    return 0


def _status(process: int) -> int | None:
    """The wait status of a child; None while it lives."""
    found, status = os.waitpid(process, os.WNOHANG)
    return status if found else None


def _await(leader: int, checkpoints: Path, kill: Kill | None, limit: float) -> int | None:
    """Wait until time and progress are as ``kill`` says; the wait status if the run ends before."""
    began, status = time.perf_counter(), None
    while status is None and (passed := time.perf_counter() - began) < limit:
        if kill is not None and passed >= kill.after and meta_step(checkpoints) >= kill.meta_step:
            return None
        rest = 0.0 if kill is None else kill.after - passed
        time.sleep(min(0.002, rest) if rest > 0 else 0.002)
        status = _status(leader)
    return status


def _await_writing(leader: int, checkpoints: Path, deadline: float) -> int | None:
    """Wait until a hidden folder appears; the wait status if the run ends before."""
    before = hidden(checkpoints)
    while time.perf_counter() < deadline:
        now = hidden(checkpoints)
        if now.items() - before.items():
            return None
        before = now
        if (status := _status(leader)) is not None:
            return status
    return None


def _kill(leader: int, stagger: float) -> int:
    """Kill all processes of a run; the wait status of the first."""
    if stagger > 0:
        victims = psutil.Process().children(recursive=True)
        random.shuffle(victims)
        for victim in victims:
            if victim.pid != leader:
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
                time.sleep(random.uniform(0, stagger))
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    return os.waitpid(leader, 0)[1]


def _wait_for_descendants() -> int:
    """Let what a run has started end; how many processes did not."""
    deadline = time.perf_counter() + _GRACE
    while (left := _living()) and time.perf_counter() < deadline:
        time.sleep(0.02)
    return len(left)


def _living() -> list[psutil.Process]:
    """All descendants; those that are dead are buried before."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return list(psutil.Process().children(recursive=True))
