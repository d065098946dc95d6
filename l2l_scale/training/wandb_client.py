"""Starting and ending a run of the W&B client such that it never asks, never waits for long, never fails."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from wandb import Run

Mode: TypeAlias = Literal["online", "offline", "disabled"]

ID_FILE = "run_id"
"""Where the id is kept, in the folder ``wandb`` of the run folder."""
NO_KEY = "there is no API key: set WANDB_API_KEY or call `wandb login`"


class Client(NamedTuple):
    """How to start a run."""

    folder: Path
    """The run folder."""
    mode: Mode | None
    """None: that of the environment and of the client's own settings."""
    init_timeout: float
    """Seconds."""
    finish_timeout: float
    """Seconds."""
    arguments: dict[str, Any]
    """Of ``wandb.init``: project, entity, name, group, tags."""

    def start(self) -> Run | None:
        """Start a run, online or offline, and say which in one line; None if nothing is logged."""
        if (self.mode or os.environ.get("WANDB_MODE")) == "disabled":
            return None  # before the client is imported, starts its service and makes folders
        try:
            with files_in(self.folder / "wandb"):
                return self._start()
        except Exception as error:
            say(f"nothing is logged ({shortly(error)})")
            return None

    def _start(self) -> Run | None:
        import wandb

        quiet: dict[str, Any] = {} if "WANDB_SILENT" in os.environ else {"silent": True}
        configured = wandb.setup(settings=wandb.Settings(**quiet)).settings.mode
        mode = self.mode or configured
        if mode == "disabled":
            return None
        why = ""
        if mode != "offline":
            try:
                return self._start_online(quiet)
            except Exception as error:
                why = f" ({shortly(error)})"
        run = self._init("offline", quiet)
        say(f"offline{why}; {how_to_sync(run)}")
        return run

    def _start_online(self, quiet: dict[str, Any]) -> Run:
        """Raises whatever the client raises, and ``ValueError`` instead of asking for a key."""
        import wandb

        wandb.setup(settings=wandb.Settings(mode="online", **quiet))
        if not wandb.login(prompt=False, verify=False):
            raise ValueError(NO_KEY)
        run = self._init("online", quiet)
        say(f"run {run.id} at {run.url}")
        return run

    def _init(self, mode: Mode, quiet: dict[str, Any]) -> Run:
        import wandb

        path = self.folder / "wandb" / ID_FILE
        kept = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)  # else wandb falls back to a temporary folder
        settings = wandb.Settings(init_timeout=self.init_timeout, finish_timeout=self.finish_timeout, **quiet)
        run = wandb.init(
            dir=str(self.folder),
            id=kept or None,
            resume="allow",
            mode=mode,
            settings=settings,
            **self.arguments,
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        path.write_text(run.id + "\n", encoding="utf-8")
        return run

    def finish(self, run: Run, exit_code: int) -> None:
        """End a run: wait for what is not uploaded yet, but not for ever."""
        started, offline = time.monotonic(), run.offline
        try:
            with files_in(self.folder / "wandb"):
                run.finish(exit_code=exit_code)
        except Exception as error:
            say(f"the end of the run was not recorded ({shortly(error)}); {how_to_sync(run)}")
            return
        if not offline and time.monotonic() - started >= self.finish_timeout:
            say(f"not everything was uploaded within {self.finish_timeout:g} s; {how_to_sync(run)}")


@contextmanager
def files_in(folder: Path) -> Iterator[None]:
    """Keep the client's files out of the home directory, unless the user chose a place for them."""
    places = {"WANDB_DATA_DIR": folder, "WANDB_CACHE_DIR": folder / "cache"}
    ours = {name: str(path.absolute()) for name, path in places.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def say(text: str) -> None:
    """Say what W&B does."""
    print(f"W&B: {text}", flush=True)


def how_to_sync(run: Run) -> str:
    """What uploads a run later."""
    return f"to upload it later: wandb sync {Path(run.dir).parent}"


def shortly(error: Exception) -> str:
    """What went wrong, in one line."""
    return shorten(str(error) or type(error).__name__, 200, placeholder=" …")
