"""A copy of the code that a job runs, so that what happens to the checkout meanwhile does not matter."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from l2l_scale.cli.run_list import is_run

LARGEST = 2**20
"""Bytes of the largest file of a checkout that is copied."""
GIT_SECONDS = 60.0
"""How long git may take to list the files."""

_PACKAGE = Path(__file__).resolve().parents[1]


def take_snapshot(folder: Path, templates: Path) -> None:
    """Fill a folder, for PYTHONPATH; what was in it is deleted.

    Args:
        folder: gets the files of the working folder, if that is in a git checkout and git does not ignore
            them, up to a megabyte each, without run folders; this package; and the job scripts in slurm/.
        templates: the folder of the job scripts.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder.parent.resolve()
    for name in _listed(Path.cwd()):
        path = Path.cwd() / name
        ours = run in path.resolve().parents or any(is_run(parent) for parent in _inner(path))
        if path.is_file() and path.stat().st_size <= LARGEST and not ours:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / name)
    for source, name in ((_PACKAGE, _PACKAGE.name), (templates, "slurm")):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def _inner(path: Path) -> list[Path]:
    """The folders between the working folder and a file in it."""
    return [parent for parent in path.parents if Path.cwd() in parent.parents]


def _listed(folder: Path) -> list[str]:
    """Files in a folder that git tracks or would track; none where there is no git."""
    command = ["git", "-C", str(folder), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return []
    return [name.decode(errors="surrogateescape") for name in done.stdout.split(b"\0") if name]
