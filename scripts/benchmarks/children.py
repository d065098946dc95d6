"""The parent's side: starts the measuring processes and asks them for repetitions."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Repetition(NamedTuple):
    """What a child did in one repetition."""

    calls: int
    """Meta-steps."""
    wall: float
    """Seconds for all of them."""
    cpu: float
    """CPU seconds, of all threads."""
    loss: float
    """Meta-loss before the first of them."""
    peak_bytes: int
    """Highest memory above that before."""


class UnavailableError(RuntimeError):
    """The child cannot measure; says why."""


class Child:
    """A process that measures, see :mod:`worker`. Must be closed."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the child
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Wait until it is prepared; "description": what it will measure, in words, and more facts.

        Raises:
            UnavailableError: if it cannot.
        """
        answer = self.receive()
        if "unavailable" in answer:
            raise UnavailableError(answer["unavailable"])
        return answer

    def repeat(self, seconds: float) -> Repetition:
        """One repetition of at least so many seconds, and at least one meta-step.

        Raises:
            UnavailableError: if the child dies of it.
        """
        return Repetition(**self.ask(str(seconds)))

    def release(self) -> None:
        """Let it give freed memory back to the system."""
        self.ask("release")

    def close(self) -> None:
        """End it: at the end of its input it goes by itself, unless it is busy."""
        try:
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line, and wait for the answer."""
        self.send(line)
        return self.receive()

    def send(self, line: str) -> None:
        """Send a line; :meth:`receive` waits for the answer. So several children work at once."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # if it is dead, receiving says why
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            UnavailableError: if the child is dead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        killed = "killed; too little memory?" if code == -9 else f"ended with code {code}: {last}"
        raise UnavailableError(killed)


def available_bytes() -> int:
    """Memory that may be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
