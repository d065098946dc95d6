"""A real Slurm of two virtual nodes on this machine, in a folder of its own, for tests.

slurmctld, two slurmd and munged run as root with their own configuration, key, sockets and ports; what is
installed in /etc/slurm is untouched. Only the names of the nodes are added to /etc/hosts for as long as the
cluster lives: Lightning takes the address of rank 0 from the list of nodes.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from cluster_settings import SETTINGS

ROOT = Path(__file__).parents[2]
HOSTS = Path("/etc/hosts")
GPUS = 2
"""Fake GPUs of a node."""
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"})


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}); on Debian: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can start a Slurm of its own"


class Cluster:
    """A Slurm that runs until :meth:`stop`.

    Args:
        folder: of everything that it writes; short, for sockets lie in it.
        grace: seconds between the SIGTERM of a preemption and the end.
        kill_wait: seconds between any other SIGTERM of Slurm's and SIGKILL.
    """

    def __init__(self, folder: Path, grace: int = 20, kill_wait: int = 10) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        ports = _free_ports(3)
        # Unique, for clusters of several test processes share /etc/hosts.
        self.nodes = [f"v{ports[0]}n{number}" for number in (1, 2)]
        for name in ("state", "log", "run", "munge", "dev", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o700)  # munged insists
        self.has_gpus = self._make_gpus()
        self.conf.write_text(
            SETTINGS.format(
                name=f"test{ports[0]}",
                host=socket.gethostname().split(".")[0],
                ports=ports,
                folder=folder,
                nodes=",".join(self.nodes),
                gres="GresTypes=gpu" if self.has_gpus else "",
                gpus=f"Gres=gpu:{GPUS}" if self.has_gpus else "",
                grace=grace,
                kill_wait=kill_wait,
            )
        )
        ours = ("SLURM", "SBATCH", "L2L_SCALE", "RAY_")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        self.environment["SLURM_CONF"] = str(self.conf)
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"

    def _make_gpus(self) -> bool:
        """Device files like those of GPUs, where the machine allows that."""
        try:
            for number in range(GPUS):
                os.mknod(self.folder / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        except OSError:
            return False
        line = f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(line)
        return True

    def start(self) -> None:
        """Start everything, and wait until both nodes are idle."""
        with _hosts() as lines:
            lines.append(f"127.0.0.1 {' '.join(self.nodes)}")
        key, run = self.folder / "munge" / "key", self.folder / "run"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        self.call(
            *("munged", "--force", f"--key-file={key}", f"--socket={run}/munge.sock"),
            *(f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log"),
            *(f"--seed-file={self.folder}/munge/seed", "--num-threads=2"),
        )
        self.call("slurmctld", "-c")
        for node in self.nodes:
            self.call("slurmd", "-N", node)
        _until(
            lambda: self.call("sinfo", "-hN", "-pmain", "-o%t").split() == ["idle", "idle"], 30, "idle nodes"
        )

    def stop(self) -> None:
        """End all jobs, and the processes that were started here; only those."""
        if self._process("slurmctld") is not None:
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False, timeout=30)
            with suppress(AssertionError):  # what is left dies with its node
                _until(lambda: not self.call("squeue", "-h").strip(), 30, "the end of all jobs")
        for name in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"):
            process = self._process(name)
            if process is not None:
                os.kill(process, signal.SIGTERM)
                _until(lambda name=name: self._process(name) is None, 20, f"the end of {name}")
        with _hosts() as lines:
            lines[:] = [line for line in lines if self.nodes[0] not in line]

    def _process(self, name: str) -> int | None:
        """The number of a process that was started here, if it lives."""
        try:
            number = int((self.folder / "run" / f"{name}.pid").read_text())
            command = Path(f"/proc/{number}/cmdline").read_bytes().decode()
        except (OSError, ValueError):
            return None
        return number if Path(command.split("\0")[0]).name.startswith(name.split(".")[0]) else None

    def call(self, *command: str, **variables: str) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command} failed with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, **variables: str) -> str:
        """The id of the job that ``sbatch`` makes of the arguments, called in the checkout."""
        return self.call("sbatch", "--parsable", *arguments, **variables).strip().split(";")[0]

    def show(self, job: str, key: str) -> str:
        """A value of ``scontrol show job``."""
        found = re.search(rf"^ +(?:\S+ +)*?{key}=(\S+)", self.call("scontrol", "show", "job", job), re.M)
        assert found, f"scontrol says no {key} of job {job}"
        return found[1]

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED …."""
        return self.show(job, "JobState")

    def exit_code(self, job: str) -> int:
        """Of the batch script."""
        return int(self.show(job, "ExitCode").split(":")[0])

    def restarts(self, job: str) -> int:
        """How often it was put back into the queue."""
        return int(self.show(job, "Restarts"))

    def wait_for(self, job: str, states: str | Iterable[str], timeout: float) -> str:
        """Wait for one of some states; a job that ends otherwise fails the test, with its log."""
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in wanted:
            over = time.monotonic() > deadline or state in ENDED
            assert not over, f"job {job} is {state}, not {sorted(wanted)}; its log:\n{self.log(job)}"
            time.sleep(0.1)
        return state

    def wait_for_text(self, job: str, text: str, timeout: float) -> str:
        """Wait until the log holds a text; the log."""
        deadline = time.monotonic() + timeout
        while text not in (log := self.log(job)):
            over = time.monotonic() > deadline or self.state(job) in ENDED
            assert not over or text in self.log(job), f"no {text!r} in the log of job {job}:\n{log}"
            time.sleep(0.1)
        return log

    def requeue(self, job: str) -> None:
        """As an administrator would."""
        self.call("scontrol", "requeue", job)

    def signal(self, job: str, name: str) -> None:
        """Send a signal to all processes that srun started, as Slurm does before a time limit."""
        self.call("scancel", f"--signal={name}", job)

    def kill(self, job: str, rank: int) -> None:
        """Kill one process of a job without warning, as the kernel does when memory runs out."""
        mine = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
        for process in psutil.process_iter(["environ", "cmdline"]):
            given = {f"{name}={value}" for name, value in (process.info["environ"] or {}).items()}
            if mine <= given and "fit" in process.info["cmdline"] and "bash" not in process.info["cmdline"]:
                process.kill()
                return
        raise AssertionError(f"job {job} has no rank {rank}")

    def cancel(self, job: str) -> None:
        """End it for good."""
        self.call("scancel", job)

    def log(self, job: str) -> str:
        """What it has written so far."""
        path = Path(self.show(job, "StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def _hosts() -> Iterator[list[str]]:
    """The lines of /etc/hosts, to be changed; one process at a time."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines()
        yield lines
        file.seek(0)
        file.write("\n".join(lines) + "\n")
        file.truncate()


def _until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:g} s in vain for {what}"
        time.sleep(0.1)
