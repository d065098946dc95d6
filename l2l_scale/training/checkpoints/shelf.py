"""The checkpoints of one run, in one folder: which there are, which is the last, which may go."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from l2l_scale.training.checkpoints.folder import LINK_DRAFT, DamagedError, discard, orphans, read_manifest

T = TypeVar("T")

LAST = "last"
"""A symbolic link to the checkpoint that was written last."""


def name_of(meta_step: int) -> str:
    """What the checkpoint after so many meta-steps is called."""
    return f"step-{meta_step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """All that are there and have a manifest, as they were written, oldest first."""
    return _in_order(folder.glob("step-*"))


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """Those that have a manifest, as they were written."""
    serials = {}
    for path in paths:
        try:
            serials[path] = int(read_manifest(path)["serial"])
        except DamagedError:
            continue
    return sorted(serials, key=lambda path: (serials[path], path.name))


def newer_than(path: Path) -> list[Path]:
    """Those beside a checkpoint that were written after it."""
    serial = read_manifest(path)["serial"]
    return [one for one in checkpoints_in(path.parent) if read_manifest(one)["serial"] > serial]


def next_serial(folder: Path) -> int:
    """The number of the next one that is written; a counter, because clocks of nodes differ."""
    there = checkpoints_in(folder)
    return int(read_manifest(there[-1])["serial"]) + 1 if there else 0


def has_checkpoint(folder: Path) -> bool:
    """Whether anything is there that may be a checkpoint, be it a damaged one."""
    return any(folder.glob("step-*")) or (folder / LAST).is_symlink() or bool(orphans(folder))


def candidates(folder: Path) -> list[Path]:
    """Where to look for the last whole checkpoint, in this order.

    The link is not asked: after a crash it may lag behind by one. Folders without a manifest that can be read
    come first, so that they are named before something older is taken. One that waits to be replaced counts
    if death came before the other was in its place.
    """
    there = [*folder.glob("step-*"), *orphans(folder)]
    whole = _in_order(there)[::-1]
    broken = sorted((path for path in there if path not in whole), reverse=True)
    return [*broken, *whole]


def last_whole(
    folder: Path, read: Callable[[Path], T], among: Iterable[Path] | None = None, quiet: bool = False
) -> tuple[Path, T]:
    """The last checkpoint that can be read, and what was read; a warning names those that were passed over.

    Args:
        folder: of the checkpoints.
        read: raises DamagedError for one that cannot be read.
        among: the candidates in their order, if they were looked for already.
        quiet: no warning.

    Raises:
        DamagedError: if there is none.
    """
    problems: list[str] = []
    for path in candidates(folder) if among is None else among:
        try:
            content = read(path)
        except DamagedError as error:
            problems.append(str(error))
            continue
        if problems and not quiet:
            warnings.warn(f"{'; '.join(problems)}. Taking {path}, which is whole", stacklevel=2)
        return path, content
    raise DamagedError(
        f"no checkpoint in {folder} is whole: {'; '.join(problems) or 'there is none'}. Start anew in "
        "another run_dir, or with --overwrite true"
    )


def point_to(path: Path) -> None:
    """Let the link ``last`` beside a checkpoint point to it; there is no moment without a link."""
    link, beside = path.with_name(LAST), path.with_name(LINK_DRAFT)
    if link.is_dir() and not link.is_symlink():  # a copied run folder whose links were followed
        shutil.rmtree(link)
    beside.unlink(missing_ok=True)
    beside.symlink_to(path.name)
    beside.replace(link)


def prune(folder: Path, keep: Iterable[str], spare: Iterable[str] = ()) -> None:
    """Delete the checkpoints that are not to be kept.

    Args:
        folder: of the checkpoints.
        keep: their names.
        spare: others that are not ours to delete.
    """
    names = {*keep, *spare}
    for path in checkpoints_in(folder):
        if path.name not in names:
            discard(path)
