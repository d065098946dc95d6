"""``l2l-scale export``: the rule of a checkpoint as a file for ``LearnedOptimizer``."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from jsonargparse import ArgumentParser

from l2l_scale.deploy import build_rule, load_rule, read_header, save_rule
from l2l_scale.optimizers import UpdateRule
from l2l_scale.training.checkpoint import KEY


def run(arguments: list[str]) -> None:
    """Export as the command line says."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Write the rule of a checkpoint as one safetensors file, without pickle.",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options")
    parser.add_argument("checkpoint", type=str, help="a checkpoint, or a run folder (then its best one)")
    parser.add_argument(
        "--out", type=str | None, default=None, help="file to write; rule.safetensors of the run if not given"
    )
    parser.add_argument(
        "--classes", type=list[str], default=[], help="your own classes that the rule is made of: [my.Rule]"
    )
    config = parser.parse_args(arguments)
    checkpoint = Path(config.checkpoint)
    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoints" / "best.ckpt"
    default = checkpoint.with_suffix(".safetensors")
    if checkpoint.parent.name == "checkpoints":
        default = checkpoint.parent.parent / "rule.safetensors"
    classes = [find_class(name) for name in config.classes]
    print(export_rule(checkpoint, Path(config.out) if config.out else default, classes))


def find_class(path: str) -> type:
    """Import a class that the user named, as ``module.Class``.

    Raises:
        ValueError: if there is none.
    """
    found = locate(path)
    if not isinstance(found, type):
        raise ValueError(
            f"classes ({path}): there is no such class; write module.Class, as in a configuration"
        )
    return found


def export_rule(checkpoint: Path, out: Path, classes: Sequence[type] = ()) -> Path:
    """Write the rule of a checkpoint to ``out``; ``classes`` as in :func:`read_rule`.

    Raises:
        ValueError: if there is no such checkpoint, or it is not one of ours.
    """
    content = read_checkpoint(checkpoint)
    saved = content[KEY]
    notes = {
        "family": saved["family"],
        "meta_steps": content["global_step"],
    }
    return save_rule(rule_of(content, classes), out, metadata=notes)


def read_rule(path: Path, classes: Sequence[type] = ()) -> UpdateRule:
    """The rule in an exported file or in a checkpoint, whichever ``path`` is.

    Args:
        path: the file.
        classes: what the file may name besides the package's own classes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither.
    """
    return rule_of(read_checkpoint(path), classes) if path.suffix == ".ckpt" else load_rule(path, classes)


def meta_steps_of(path: Path) -> int | None:
    """After how many meta-steps a rule's file was written; None if it does not say."""
    if path.suffix == ".ckpt":
        return int(read_checkpoint(path)["global_step"])
    steps = read_header(path)["metadata"].get("meta_steps")
    return steps if isinstance(steps, int) else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content; nothing in it is executed.

    Raises:
        ValueError: if there is no such file, it is damaged, or it is not one of ours.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; run folders keep theirs in checkpoints/")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or KEY not in content:
        raise ValueError(f"{path} was not written by l2l-scale fit")
    return content


def rule_of(content: dict[str, Any], classes: Sequence[type] = ()) -> UpdateRule:
    """Build the rule that a checkpoint holds."""
    weights = {name.removeprefix("rule."): value for name, value in content["state_dict"].items()}
    return build_rule(content[KEY]["rule"], weights, classes)
