"""What a run said, with times, and why it failed, with the traceback: ``log.txt`` in the run folder."""

from __future__ import annotations

import logging
from pathlib import Path

LOG_FILE = "log.txt"

_log = logging.getLogger("l2l_scale.run")
_log.propagate = False
_log.setLevel(logging.INFO)


def open_log(folder: Path) -> None:
    """Write what is said from now on into a folder as well, after what is there already."""
    close_log()
    handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
    _log.addHandler(handler)


def close_log() -> None:
    """Write nothing more."""
    for handler in list(_log.handlers):
        _log.removeHandler(handler)
        handler.close()


def say(text: str) -> None:
    """Print, and write into the log if one is open."""
    print(text, flush=True)
    _log.info(text)


def note_failure(error: BaseException) -> None:
    """Write an exception into the log, if one is open: on the console it is one line."""
    if _log.handlers:
        _log.error("failed: %s", error, exc_info=error)
