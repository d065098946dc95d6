"""Rules that come with the package, and rules as folders that can be shared.

A rule's folder is the same in the package, on a disk and on the Hugging Face Hub: ``rule.safetensors``, its
model card ``README.md``, ``config.yaml`` that it is trained again from, and the reports ``reports/*.json``
that the card's figures are from.
"""

from __future__ import annotations

from pathlib import Path

RULE, CARD, CONFIG, REPORTS = "rule.safetensors", "README.md", "config.yaml", "reports"
"""The files of a rule's folder, and the folder of its reports."""

_SHELF = Path(__file__).resolve().parents[1] / "pretrained"


def pretrained_names() -> list[str]:
    """Names of the rules that come with the package."""
    return sorted(path.parent.name for path in _SHELF.glob(f"*/{RULE}"))


def pretrained_folder(name: str) -> Path:
    """The folder of a rule that comes with the package.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in pretrained_names():
        raise ValueError(
            f"there is no pretrained rule {name!r}; there are {', '.join(pretrained_names()) or 'none'}"
        )
    return _SHELF / name


def find_rule(given: str | Path) -> Path:
    """The rule file that is meant: a file, the one in a folder, or that of a pretrained rule, in this order.

    A name never means a download; :func:`l2l_scale.deploy.pull_rule` is for that.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if it is a folder without a rule.
    """
    path = Path(given)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / RULE).is_file():
            return path / RULE
        raise ValueError(
            f"{path} is a folder without a {RULE}; `l2l-scale export` makes one of a run or a checkpoint"
        )
    if str(given) in pretrained_names():
        return pretrained_folder(str(given)) / RULE
    raise FileNotFoundError(
        f"there is no rule file {path}; `l2l-scale export` writes one. Rules that come with the package: "
        f"{', '.join(pretrained_names()) or 'none'}"
    )
