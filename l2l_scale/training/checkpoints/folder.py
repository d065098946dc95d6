"""One checkpoint on disk: a folder that is there as a whole or not at all.

    step-00000400/
      manifest.json                    what is in it: sizes and SHA-256 of the files, versions, meta-step
      training.pt                      φ, Adam, schedule, loops, callbacks, window counter (torch.save)
      slots-00000-of-00002.pt          the tasks in flight, one file for each rank that wrote
      config.yaml                      the configuration, if the trainer was given it

It is written into ``.step-00000400.draft`` beside its place, flushed to the disk file by file, and renamed.
The manifest is written last and has a checksum of its own. The ``.pt`` files hold tensors and plain types and
are read with ``weights_only``: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from l2l_scale.files import write_atomically

FORMAT = "l2l_scale.checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
TRAINING = "training.pt"
LINK_DRAFT = ".last.draft"
"""A link that is about to replace the one to the last checkpoint."""
_FIELDS = ("files", "serial", "meta_step", "versions")
_CHUNK = 1 << 22
"""Bytes read at once."""


class DamagedError(ValueError):
    """A checkpoint is not whole, or is none of ours."""


class Entry(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def slots_file(rank: int, world_size: int) -> str:
    """The name of the file with a rank's slots."""
    return f"slots-{rank:05d}-of-{world_size:05d}.pt"


def draft_of(path: Path) -> Path:
    """Where the checkpoint ``path`` is put together; hidden, and swept away if it is found later."""
    return path.with_name(f".{path.name}.draft")


def old_of(path: Path) -> Path:
    """Where the checkpoint ``path`` waits while another one takes its place."""
    return path.with_name(f".{path.name}.old")


def write_tensors(path: Path, content: Any) -> Entry:
    """Write tensors and plain types to a file, flushed to the disk.

    Raises:
        OSError: if that fails: a full disk, a folder that is read-only.
    """
    with path.open("wb") as file:
        sink, checks = _Hashed(file), get_crc32_options()
        set_crc32_options(False)  # half of the time, and the manifest has better checksums
        try:
            torch.save(content, cast(IO[bytes], sink))
        except RuntimeError as error:  # torch's own complaint about a position, after write() failed
            raise (sink.error or error) from error
        finally:
            set_crc32_options(checks)
        file.flush()
        os.fsync(file.fileno())
    return Entry(sink.bytes, sink.digest.hexdigest())


def write_text(path: Path, text: str) -> Entry:
    """Write a text to a file, flushed to the disk."""
    content = text.encode()
    write_atomically(path, content)
    return Entry(len(content), hashlib.sha256(content).hexdigest())


def commit(path: Path, entries: Mapping[str, Entry], notes: Mapping[str, Any]) -> None:
    """Make the draft of ``path``, which has all its files, the checkpoint ``path``.

    Args:
        path: the checkpoint; one that is there already is replaced.
        entries: of the files.
        notes: more for the manifest, as JSON.
    """
    draft = draft_of(path)
    files = {name: entry._asdict() for name, entry in sorted(entries.items())}
    manifest = {"format": FORMAT, "version": VERSION, **notes, "files": files}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2, ensure_ascii=False)
    write_text(draft / MANIFEST, text + "\n")
    flush_folder(draft)
    aside = old_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    if path.is_dir():
        path.rename(aside)
    try:
        draft.rename(path)
    except OSError:
        if aside.is_dir():
            aside.rename(path)
        raise
    flush_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a checkpoint; at no moment does a part of it look like one."""
    draft = draft_of(path)
    shutil.rmtree(draft, ignore_errors=True)
    path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Delete what interrupted writing and deleting left in a folder, and finish interrupted replacing."""
    waiting = orphans(folder)
    for aside in folder.glob(".step-*.old"):
        if aside in waiting:
            aside.rename(_place_of(aside))
        else:
            shutil.rmtree(aside, ignore_errors=True)
    for draft in folder.glob(".step-*.draft"):
        shutil.rmtree(draft, ignore_errors=True)
    (folder / LINK_DRAFT).unlink(missing_ok=True)


def orphans(folder: Path) -> list[Path]:
    """Checkpoints that wait for another one to take their place, which did not get there."""
    return [aside for aside in folder.glob(".step-*.old") if not _place_of(aside).exists()]


def _place_of(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix(".").removesuffix(".old"))


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked; the files are not.

    Raises:
        DamagedError: if it is missing, damaged, or of a newer version.
    """
    if not path.is_dir():
        raise DamagedError(f"{path} is not a checkpoint of l2l_scale, which are folders with a {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is not a checkpoint of l2l_scale: it has no {MANIFEST}") from error
    except (ValueError, OSError) as error:
        raise DamagedError(f"{path / MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{path} is not a checkpoint of l2l_scale, by its {MANIFEST}")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise DamagedError(
            f"{path} has format version {version}, and this l2l_scale knows up to {VERSION}; it was written "
            f"by l2l_scale {manifest.get('versions', {}).get('l2l_scale')}: upgrade to that"
        )
    if manifest.pop("sha256", None) != _digest(manifest):
        raise DamagedError(f"{path / MANIFEST} is damaged (its checksum does not match)")
    missing = [name for name in _FIELDS if name not in manifest] or {TRAINING} - manifest["files"].keys()
    if missing:
        raise DamagedError(f"{path / MANIFEST} lacks {', '.join(missing)}")
    return manifest


def check_file(path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Compare a file with what the manifest says of it.

    Raises:
        DamagedError: if it differs, or cannot be read.
    """
    entry, file = Entry(**manifest["files"][name]), path / name
    try:
        size = file.stat().st_size
        if size != entry.bytes:
            raise DamagedError(f"{file} is damaged: it has {size:,} bytes, not {entry.bytes:,}")
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise DamagedError(f"{file} cannot be read ({error.strerror or error})") from error
    if digest.hexdigest() != entry.sha256:
        raise DamagedError(f"{file} is damaged (its checksum does not match)")


def read_tensors(path: Path, mapped: bool = False) -> Any:
    """What :func:`write_tensors` wrote, on the CPU; nothing in it is executed.

    Args:
        path: the file.
        mapped: leave the tensors in the file until they are looked at.

    Raises:
        DamagedError: if there is anything else in it, or it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # on made-up content torch stumbles in many ways
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DamagedError(f"{path} cannot be read as tensors and plain types: {reason}") from error


class _Hashed(io.RawIOBase):
    """A file to write to that knows the checksum, and why writing failed."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, and take note."""
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
