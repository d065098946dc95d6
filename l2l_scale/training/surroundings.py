"""What a run was made with: the state of the code and the versions of the libraries."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

LIBRARIES = ("l2l_scale", "torch", "lightning", "ray", "wandb", "numpy")
GIT_SECONDS = 5.0
"""How long git may take; on a network file system a big repository can be slow."""


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(*folders: Path) -> dict[str, str | bool | None]:
    """Commit, branch, remote, and whether tracked files differ from the commit.

    Args:
        folders: where to look; the first that is in a repository counts. If none is given: the working
            folder, then the checkout that this package stands in.

    Returns:
        "commit", "branch" (None if detached), "remote" (without user and password) and "dirty" (None if that
        took too long); empty where there is no git, no repository or no commit.
    """
    for folder in folders or _usual_folders():
        commit = _git(folder, "rev-parse", "HEAD")
        if commit:
            changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return {
                "commit": commit,
                "branch": _git(folder, "symbolic-ref", "--quiet", "--short", "HEAD") or None,
                "remote": without_login(_git(folder, "remote", "get-url", "origin") or "") or None,
                "dirty": None if changed is None else bool(changed),
            }
    return {}


def without_login(url: str) -> str:
    """A URL without user and password, which may be an access token."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.scheme else url


def _usual_folders() -> list[Path]:
    """The working folder; the package's own only if it is a checkout, not if it is installed somewhere."""
    checkout = Path(__file__).parents[2]
    return [Path.cwd(), *([checkout] if (checkout / ".git").exists() else [])]


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails, hangs or is missing."""
    command = ["git", "-C", str(folder), *arguments]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_SECONDS, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
