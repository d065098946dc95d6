"""Where a run is written: one folder a run, chosen so that nothing of another run is lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from l2l_scale.cli.run_log import LOG_FILE
from l2l_scale.run_record import RUN_FILE

LOCK = ".lock"
PATIENCE = 10.0
"""Seconds to wait for a process that is about to end, as after requeueing."""
RUN_DIR_VARIABLE = "L2L_SCALE_RUN_DIR"  # how the processes that Lightning starts learn the folder


def choose_folder(wish: str | None, name: str, checkpoint: str | None, overwrite: bool) -> Path:
    """The run folder; a fresh numbered one where none is wished for.

    Args:
        wish: the folder.
        name: of a fresh one in ``runs/``.
        checkpoint: that the run goes on from, or "last", which is that of ``runs/NAME`` without a wish.
        overwrite: delete what is there.

    Raises:
        ValueError: if the folder has a run in it that is neither resumed nor to be overwritten, or that is to
            be both; or if processes that were started one by one do not know which folder is meant.
    """
    if checkpoint and overwrite:
        raise ValueError("overwrite (true) would delete the run that ckpt_path resumes; give one of them")
    if launched_by_lightning(os.environ):
        return Path(os.environ[RUN_DIR_VARIABLE])
    rank, ranks = _started_by_others(os.environ)
    if ranks > 1 and wish is None:
        raise ValueError(
            f"run_dir must be given where torchrun or srun starts the {ranks} processes: they cannot agree "
            "on a new folder"
        )
    if rank > 0 and wish is not None:
        return Path(wish)  # rank 0 looks into it
    usual = Path("runs") / name if checkpoint == "last" else _fresh(Path("runs"), name)
    folder = usual if wish is None else Path(wish)
    own = (folder / "checkpoints").resolve()
    resumes = checkpoint == "last" or (checkpoint is not None and Path(checkpoint).resolve().parent == own)
    if folder.exists() and any(folder.iterdir()) and not resumes and not overwrite:
        other = f", and ckpt_path ({checkpoint}) is none of its checkpoints" if checkpoint else ""
        raise ValueError(
            f"run_dir ({folder}) is not empty{other}; resume it with --ckpt_path last, replace it with "
            "--overwrite true, or choose another folder"
        )
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    return folder


def launched_by_lightning(environment: Mapping[str, str]) -> bool:
    """Whether this is one of the further processes that Lightning started for more devices."""
    return RUN_DIR_VARIABLE in environment and environment.get("LOCAL_RANK", "0") != "0"


def _started_by_others(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of processes, as torchrun or srun says; (0, 1) where Lightning starts the others."""
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and ranks in environment:
            return int(environment[rank]), int(environment[ranks])
    return 0, 1


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Make sure that no other process trains in this folder meanwhile. The lock ends with the process.

    Raises:
        RuntimeError: if another one does, and does not end within seconds.
    """
    lock, missing = FileLock(folder / LOCK, timeout=PATIENCE), [folder, *folder.parents]
    missing = [path for path in missing if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        holder = lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"run_dir ({folder}) is in use: another process trains there (`l2l-scale runs` shows where). "
            "Wait for it, stop it, or choose another folder"
        ) from error
    with holder:
        try:
            yield
        finally:
            if list(folder.iterdir()) == [folder / LOCK]:  # it was refused before it started: nothing is left
                (folder / LOCK).unlink()
                for path in missing:
                    path.rmdir()


@contextmanager
def keeping_metrics(folder: Path, began: Callable[[], bool]) -> Iterator[None]:
    """Put the metrics of a run that is resumed out of the way: the logger starts its file anew.

    They are put back if what happens inside ends before training began, or without new ones, as where nothing
    was left to train.
    """
    metrics, number = folder / "metrics.csv", 1
    while (kept := folder / f"metrics-{number}.csv").exists():
        number += 1
    if metrics.exists():
        metrics.rename(kept)
    try:
        yield
    finally:
        if kept.exists() and not (began() and metrics.exists()):
            kept.replace(metrics)


def empty(folder: Path) -> None:
    """Delete a run; only what a run writes, so that a mistyped folder loses nothing else."""
    for name in ("checkpoints", "diagnosis", "evaluation", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files = (
        folder / name for name in ("config.yaml", "rule.safetensors", "validation.png", LOG_FILE, RUN_FILE)
    )
    for path in (*files, *folder.glob("metrics*.csv"), *folder.glob(f".{RUN_FILE}.*.tmp")):
        path.unlink(missing_ok=True)


def _fresh(parent: Path, name: str) -> Path:
    folder, number = parent / name, 1
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def find_checkpoint(wish: str | None, folder: Path) -> str | None:
    """The checkpoint to resume from; None if there is nothing to resume.

    Args:
        wish: a checkpoint, or "last": that of the run folder, or a fresh start where it has none.
        folder: the run folder.

    Raises:
        ValueError: if it does not exist.
    """
    from l2l_scale.training.checkpoints.shelf import LAST, has_checkpoint

    if wish is None:
        return None
    if wish == LAST:
        return str(folder / "checkpoints" / LAST) if has_checkpoint(folder / "checkpoints") else None
    if Path(wish).name == LAST and has_checkpoint(Path(wish).parent):
        return wish  # the link itself may be missing, or point nowhere
    if not Path(wish).exists():
        raise ValueError(
            f"ckpt_path ({wish}): there is no such checkpoint; run folders keep theirs in checkpoints/"
        )
    return wish
