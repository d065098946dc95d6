"""Writing a checkpoint together, reading it again, and falling back to an older one that is whole."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from l2l_scale.training.checkpoints import folder as files
from l2l_scale.training.checkpoints import shelf
from l2l_scale.training.checkpoints.folder import DamagedError, Entry
from l2l_scale.training.checkpoints.inflight import KEY, SLOTS
from l2l_scale.training.checkpoints.together import all_or_none, nothing, together
from l2l_scale.training.ranks import rank, world_size
from l2l_scale.training.surroundings import versions
from l2l_scale.tree import tree_map

LOADED_FROM = "loaded_from"
"""Below KEY, in what was loaded: the path of the checkpoint that it came from."""
HANDED_OVER = ".temp.ckpt"
"""Lightning's name of the file by which processes that it forked or spawned hand φ over at the end."""
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OF_LIGHTNING = {"pytorch-lightning_version", "state_dict", "loops", "global_step"}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class CheckpointFolders(CheckpointIO):
    """Checkpoints of this package for Lightning's trainer. Loading verifies every file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Not to be used, because only rank 0 is asked by Lightning; but for φ from one process to another.

        Raises:
            RuntimeError: for anything else.
        """
        if Path(path).name == HANDED_OVER:
            files.write_tensors(Path(path), _compact(checkpoint))
            return
        raise RuntimeError("use l2l_scale.training.Trainer: checkpoints are written by all ranks together")

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Collective. Read a checkpoint; ``…/last`` is the last one in that folder that is whole.

        Raises:
            DamagedError: on all ranks, if it is damaged on any, or none in the folder is whole.
        """
        path = Path(path)
        if path.name == HANDED_OVER and path.is_file():
            handed_over: dict[str, Any] = files.read_tensors(path)
            return handed_over
        if path.name != shelf.LAST:
            return _load(path)
        # All ranks must try the same ones in the same order, whatever their view of the file system.
        among = together(lambda: shelf.candidates(path.parent) if rank() == 0 else [])[0]
        return shelf.last_whole(path.parent, _load, among, quiet=rank() > 0)[1]

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        if Path(path).is_dir():
            files.discard(Path(path))
        else:
            Path(path).unlink(missing_ok=True)


def save_together(content: dict[str, Any], path: Path, texts: Mapping[str, str]) -> None:
    """Collective. Write a checkpoint: rank 0 what all have in common, every rank its slots.

    Args:
        content: as Lightning dumps it on each rank.
        path: the folder that it becomes.
        texts: more files, by name.

    Raises:
        CheckpointError: on all ranks, if one of them could not write; the draft is deleted.
    """
    draft = files.draft_of(path)

    def begin() -> None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)

    def write() -> dict[str, Entry]:
        ours, slots = content.get(KEY), None
        if ours is not None:
            slots = ours.pop(SLOTS)
        entries = {}
        if slots is not None:
            name = files.slots_file(rank(), world_size())
            entries[name] = files.write_tensors(draft / name, _compact(slots))
        if rank() == 0:
            entries[files.TRAINING] = files.write_tensors(draft / files.TRAINING, _compact(content))
            entries |= {name: files.write_text(draft / name, text) for name, text in texts.items()}
        return entries

    try:
        together(begin if rank() == 0 else nothing)
        entries = {name: entry for part in together(write) for name, entry in part.items()}
        together((lambda: _finish(content, path, entries)) if rank() == 0 else nothing)
    except Exception as error:  # mostly OSError
        if rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(_why_not_written(path, error)) from error


def on_rank_0(path: Path, function: Callable[[], None]) -> None:
    """Collective. Let rank 0 do what comes after a checkpoint was written.

    Raises:
        CheckpointError: on all ranks, if it cannot.
    """
    try:
        together(function if rank() == 0 else nothing)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} is written, but the link {shelf.LAST} cannot be set, or older ones "
            f"cannot be deleted: {error.strerror or error}"
        ) from error


def _finish(content: Mapping[str, Any], path: Path, entries: Mapping[str, Entry]) -> None:
    """Put the draft in its place. A file of another rank may be missing where nodes share no file system."""
    missing = [name for name in entries if not (files.draft_of(path) / name).exists()]
    if missing:
        raise OSError(
            f"{', '.join(missing)} of other ranks cannot be seen from rank 0; run_dir must be on a file "
            "system that all nodes share"
        )
    notes = {
        "serial": shelf.next_serial(path.parent),
        "meta_step": content["global_step"],
        "next_window": content.get(KEY, {}).get("next_window"),
        "ranks": world_size(),
        "versions": versions(),
    }
    files.commit(path, entries, notes)


def _load(path: Path) -> dict[str, Any]:
    """Collective. Read one checkpoint; each rank verifies some of its files.

    Raises:
        DamagedError: on all ranks, if it is damaged on any.
    """

    def check() -> dict[str, Any]:
        manifest = files.read_manifest(path)
        for name in sorted(manifest["files"])[rank() :: world_size()]:
            files.check_file(path, name, manifest)
        return manifest

    def read() -> dict[str, Any]:
        content: dict[str, Any] = files.read_tensors(path / files.TRAINING)
        if not isinstance(content, dict) or not content.keys() >= _OF_LIGHTNING:
            raise DamagedError(f"{path / files.TRAINING} is no checkpoint of a run")
        if KEY in content:
            parts = sorted(name for name in manifest["files"] if name.startswith("slots-"))
            content[KEY][SLOTS] = [piece for name in parts for piece in _read_slots(path / name)]
            content[KEY][LOADED_FROM] = str(path)
        return content

    manifest = together(check)[rank()]
    changed = {
        name: f"{then} then, {now} now"
        for name, now in versions().items()
        if (then := manifest["versions"].get(name, now)) != now
    }
    if changed and rank() == 0:
        text = "; ".join(f"{name} {difference}" for name, difference in changed.items())
        warnings.warn(f"{path} was written with other versions: {text}. Bits may differ", stacklevel=2)
    return all_or_none(read)


def _read_slots(path: Path) -> list[dict[str, Any]]:
    """What one rank had in flight.

    Raises:
        DamagedError: if there is anything else in the file.
    """
    pieces: list[dict[str, Any]] = files.read_tensors(path, mapped=True)
    if not isinstance(pieces, list) or not all(
        isinstance(piece, dict) and piece.keys() >= {"first", "leaves"}
        for rank in pieces
        for piece in (rank.values() if isinstance(rank, dict) else [rank])
    ):
        raise DamagedError(f"{path} holds no slots")
    return pieces


def _compact(tree: Any) -> Any:
    """Tensors on the CPU, without what else is in their storages: torch.save writes those as a whole.

    Raises:
        ValueError: if there is anything that could not be read again without executing it.
    """

    def compact(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            if isinstance(leaf, np.generic) or not isinstance(leaf, _PLAIN):
                raise ValueError(
                    f"there is a {type(leaf).__module__}.{type(leaf).__qualname__} in it (of a callback's "
                    "state_dict?); only tensors and plain types can be read again safely"
                )
            return leaf
        leaf = leaf.detach().cpu()
        return leaf if leaf.untyped_storage().nbytes() == leaf.nbytes else leaf.clone()

    return tree_map(compact, tree)


def _why_not_written(path: Path, error: Exception) -> str:
    whole = shelf.checkpoints_in(path.parent)
    last = f"the last whole checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"
    return f"cannot write the checkpoint {path}: {getattr(error, 'strerror', None) or error}; {last}"
