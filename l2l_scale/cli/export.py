"""``l2l-scale export``: the rule of a checkpoint as a file for ``LearnedOptimizer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import ArgumentParser

from l2l_scale.deploy import build_rule, load_rule, read_header, save_rule
from l2l_scale.optimizers import UpdateRule
from l2l_scale.training.checkpoints.callback import STATE_KEY
from l2l_scale.training.checkpoints.folder import TRAINING, check_file, read_manifest, read_tensors
from l2l_scale.training.checkpoints.inflight import KEY
from l2l_scale.training.checkpoints.shelf import LAST, last_whole


def run(arguments: list[str]) -> None:
    """Export as the command line says."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Write the rule of a checkpoint as one safetensors file, without pickle.",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options")
    parser.add_argument(
        "checkpoint",
        type=str,
        help="a run folder, for its best rule so far; or a checkpoint, for the rule as it was then",
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="file to write; rule.safetensors or rule-CHECKPOINT.safetensors in the run folder if not given",
    )
    parser.add_argument(
        "--classes", type=list[str], default=[], help="your own classes that the rule is made of: [my.Rule]"
    )
    config = parser.parse_args(arguments)
    given, classes = Path(config.checkpoint), [find_class(name) for name in config.classes]
    if (given / "checkpoints").is_dir():
        out, source, best = given / "rule.safetensors", given / "checkpoints" / LAST, True
    else:
        run_folder = given.parent.parent if given.parent.name == "checkpoints" else given.parent
        out, source, best = run_folder / f"rule-{given.name}.safetensors", given, False
    print(export_rule(source, Path(config.out) if config.out else out, classes, best=best))


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


def export_rule(checkpoint: Path, out: Path, classes: Sequence[type] = (), best: bool = False) -> Path:
    """Write the rule of a checkpoint to ``out``; ``classes`` as in :func:`read_rule`.

    Args:
        checkpoint: its folder.
        out: the file to write.
        classes: what the checkpoint may name besides the package's own classes.
        best: not the rule as it was then, but the one that had been best in validation by then.

    Raises:
        ValueError: if there is no such checkpoint, or it is not one of ours.
    """
    content = read_checkpoint(checkpoint)
    chosen = content["callbacks"].get(STATE_KEY, {}).get("best") if best else None
    chosen = chosen or {"phi": content["state_dict"], "meta_step": content["global_step"]}
    notes = {"family": content[KEY]["family"], "meta_steps": chosen["meta_step"]}
    return save_rule(build(content, chosen["phi"], classes), out, metadata=notes)


def read_rule(path: Path, classes: Sequence[type] = ()) -> UpdateRule:
    """The rule in an exported file or in a checkpoint, whichever ``path`` is.

    Args:
        path: the file, or the checkpoint's folder.
        classes: what it may name besides the package's own classes.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is neither.
    """
    if path.is_dir():
        content = read_checkpoint(path)
        return build(content, content["state_dict"], classes)
    return load_rule(path, classes)


def meta_steps_of(path: Path) -> int | None:
    """After how many meta-steps a rule's file was written; None if it does not say."""
    if path.is_dir():
        return int(read_manifest(path)["meta_step"])
    steps = read_header(path)["metadata"].get("meta_steps")
    return steps if isinstance(steps, int) else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides the tasks in flight; nothing in it is executed.

    Args:
        path: its folder; ``…/last`` is the last one that is whole.

    Raises:
        ValueError: if there is no such checkpoint, it is damaged, or it is not one of ours.
    """
    if path.name == LAST:
        return last_whole(path.parent, read_checkpoint)[1]
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}; run folders keep theirs in checkpoints/")
    check_file(path, TRAINING, read_manifest(path))
    content: dict[str, Any] = read_tensors(path / TRAINING)
    if KEY not in content:
        raise ValueError(f"{path} was not written by l2l-scale fit")
    return content


def build(content: dict[str, Any], phi: Mapping[str, Any], classes: Sequence[type] = ()) -> UpdateRule:
    """Build the rule that a checkpoint describes, with this φ of the module."""
    weights = {name.removeprefix("rule."): value for name, value in phi.items()}
    return build_rule(content[KEY]["rule"], weights, classes)
