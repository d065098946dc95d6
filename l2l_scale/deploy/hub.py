"""Rules on the Hugging Face Hub, or in a folder of your own: pushed there, and pulled from there."""

from __future__ import annotations

import shutil
from pathlib import Path

from l2l_scale.deploy.files import read_header
from l2l_scale.deploy.pretrained import CARD, CONFIG, REPORTS, RULE

_PATTERNS = [RULE, CARD, CONFIG, f"{REPORTS}/*.json"]
"""What is pushed and pulled; nothing else of a folder is touched."""


def push_rule(folder: str | Path, target: str, private: bool = False) -> str:
    """Publish a rule's folder (see :mod:`l2l_scale.deploy.pretrained`).

    Args:
        folder: with ``rule.safetensors`` at least.
        target: "owner/name" on the Hub, where the repository is made if it is not there (log in with
            ``hf auth login``, or set HF_TOKEN); or a local folder, with a path that begins with ".", "/"
            or "~".
        private: whether a repository that is made can be seen by its owner only.

    Returns:
        Where it is now.

    Raises:
        FileNotFoundError: if there is no rule in the folder.
        ValueError: if the rule is damaged.
    """
    source = Path(folder)
    read_header(source / RULE)  # what cannot be read must not be published
    if _is_local(target):
        return str(_copy(source, Path(target).expanduser()))
    from huggingface_hub import HfApi  # here, not above: using a rule must not need it

    api = HfApi()
    api.create_repo(target, private=private, exist_ok=True)
    found = api.upload_folder(
        repo_id=target, folder_path=source, allow_patterns=_PATTERNS, commit_message=f"{source.name}, {RULE}"
    )
    return str(found.commit_url)


def pull_rule(source: str, out: str | Path, revision: str | None = None) -> Path:
    """Get a rule's folder, and check that the rule in it is whole.

    Args:
        source: as the target of :func:`push_rule`.
        out: the folder to write; made if it is not there.
        revision: branch, tag or commit on the Hub; "main" if not given.

    Returns:
        The rule file, as :class:`~l2l_scale.deploy.LearnedOptimizer` takes it.

    Raises:
        FileNotFoundError: if there is no rule there.
        ValueError: if the rule is damaged, or a revision is given for a local folder.
    """
    if _is_local(source):
        if revision is not None:
            raise ValueError(f"revision ({revision!r}) must not be given for a local folder ({source})")
        _copy(Path(source).expanduser(), Path(out))
    else:
        from huggingface_hub import snapshot_download

        snapshot_download(source, revision=revision, local_dir=out, allow_patterns=_PATTERNS)
    read_header(Path(out) / RULE)
    return Path(out) / RULE


def _is_local(place: str) -> bool:
    return place.startswith((".", "/", "~"))


def _copy(source: Path, target: Path) -> Path:
    """Copy what belongs to a rule."""
    if not (source / RULE).is_file():
        raise FileNotFoundError(f"there is no {RULE} in {source}")
    for pattern in _PATTERNS:
        for path in source.glob(pattern):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return target
