"""Finds and opens data sets: local folders first, then the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

ALIASES = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
"""Short names of data sets on the Hub."""

DATA_VARIABLE = "L2L_SCALE_DATA"
"""Environment variable that names a folder with local data sets, one folder each ($L2L_SCALE_DATA/mnist)."""

_HUB_TIMEOUT = 5.0  # seconds; left alone, a load without network retries for half a minute


def locate(name: str) -> str:
    """Where to find a data set: the absolute path of a folder, or a name on the Hub.

    $L2L_SCALE_DATA/<last part of the name> goes first, then the folder ``name``, then the Hub.

    Raises:
        ValueError: if ``name`` can only be a folder but is none, or $L2L_SCALE_DATA is not a folder.
    """
    if not name:
        raise ValueError("dataset ('') must be a name or a folder")
    root = os.environ.get(DATA_VARIABLE)
    if root is not None:
        if not Path(root).expanduser().is_dir():
            raise ValueError(f"{DATA_VARIABLE} ({root}) must name an existing folder with data sets in it")
        local = Path(root).expanduser() / name.rpartition("/")[2]
        if not _is_path(name) and local.is_dir():
            return str(local.resolve())
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if _is_path(name):
        raise ValueError(
            f"dataset ({name!r}) must be an existing folder, and {folder.resolve()} is none. {_way_out(name)}"
        )
    return ALIASES.get(name, name)


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a folder: names on the Hub are "name" or "owner/name"."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


def _way_out(name: str) -> str:
    """How to get a data set that is not there."""
    short = name.rstrip("/").rpartition("/")[2]
    hub_name = ALIASES.get(short, f"<owner>/{short}" if _is_path(name) else name)
    return (
        f"Where there is a network, `hf download {hub_name} --repo-type dataset --local-dir {short}` gets "
        f"it; then give that folder's path as dataset, or set {DATA_VARIABLE} to the folder above it. "
        "The dataset 'digits' needs no download"
    )


def open_dataset(place: str) -> datasets.DatasetDict:
    """Open what :func:`locate` found. Fails within seconds where there is no network.

    Raises:
        ValueError: if the folder cannot be read, or the Hub is out of reach or does not have the data set.
    """
    if not Path(place).is_dir():
        return _open_from_hub(place)
    import datasets  # here, not above: it takes a second to import

    try:
        return datasets.load_dataset(place)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset ({place}) is a folder that `datasets` cannot read: {error}") from error


def _open_from_hub(name: str) -> datasets.DatasetDict:
    """Open from the Hub, or from the Hub's local cache where there is no network."""
    import datasets

    trouble = _trouble_with_hub(name)
    with _offline(trouble is not None):
        try:
            return datasets.load_dataset(name)
        except (OSError, ValueError, RuntimeError) as error:
            reason = f"cannot be loaded: {error}" if trouble is None else f"cannot be reached ({trouble})"
            raise ValueError(
                f"dataset ({name!r}) on the Hugging Face Hub {reason}. {_way_out(name)}"
            ) from error


def _trouble_with_hub(name: str) -> Exception | None:
    """What keeps us from asking the Hub about a data set, if anything does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(f"dataset ({name!r}) is not on the Hugging Face Hub, or is private") from error
    except Exception as error:  # what is raised without network depends on the HTTP library of the day
        return error
    return None


@contextmanager
def _offline(active: bool) -> Iterator[None]:
    """Let `datasets` look into its cache at once, instead of trying the network for half a minute first."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or active
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
