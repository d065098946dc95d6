"""What Lightning does not save: the tasks in flight, the window counter, and what the rule is.

A checkpoint holds only tensors and plain types, so it loads without executing anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from l2l_scale.deploy import describe_rule
from l2l_scale.training.data import WindowData
from l2l_scale.tree import tree_leaves, tree_map, tree_unflatten
from l2l_scale.unroll import Carry

if TYPE_CHECKING:
    from l2l_scale.training.module import MetaTraining

KEY = "l2l_scale"


def save(checkpoint: dict[str, Any], module: MetaTraining) -> None:
    """Collective. Write the in-flight state of every rank's slots into ``checkpoint``."""
    checkpoint[KEY] = {
        "rule": describe_rule(module.rule),
        "family": repr(module.family),
        "data": _describe_data(module),
        "next_window": module.next_window,
        "windows_lost": module.windows_lost,
        "num_diverged": module.num_diverged,
        "num_skipped": module.num_skipped,
        "carry": None if module.carry is None else tree_leaves(_gather(module, module.carry)),
    }


def load(checkpoint: dict[str, Any], module: MetaTraining) -> None:
    """Take up the in-flight state in this rank's slots.

    Raises:
        ValueError: if the checkpoint is not ours, or is one of another rule or other data.
    """
    if KEY not in checkpoint:
        raise ValueError(
            "this checkpoint was not written by l2l_scale; give one of a run folder's checkpoints/"
        )
    saved = checkpoint[KEY]
    difference = first_difference(saved["rule"], describe_rule(module.rule), "rule")
    difference = difference or first_difference(saved["data"], _describe_data(module), "data")
    if difference:
        raise ValueError(
            f"the checkpoint is one of another run: {difference}. Resume with the run's own config.yaml, or "
            "start a new run without --ckpt_path"
        )
    for name in ("next_window", "windows_lost", "num_diverged", "num_skipped"):
        setattr(module, name, saved[name])
    if saved["carry"] is not None:
        module.carry = _restore(saved["carry"], module)


def first_difference(saved: Any, now: Any, path: str) -> str:
    """Name the first entry in which two nested descriptions differ; empty if they are equal."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            found = first_difference(saved.get(key), now.get(key), f"{path}.{key}")
            if found:
                return found
        return ""
    return "" if saved == now else f"{path} is {saved!r} there and {now!r} here"


def _describe_data(module: MetaTraining) -> dict[str, Any]:
    """What the windows depend on; nothing where they do not come from our data module."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    return data.describe(module.trainer.world_size) if isinstance(data, WindowData) else {}


def _gather(module: MetaTraining, carry: Carry) -> Carry:
    """Collective. The slots of all ranks, in global order."""
    if module.trainer.world_size == 1:
        return carry

    def gather(leaf: Tensor) -> Tensor:
        return module.all_gather(leaf).flatten(0, 1)  # type: ignore[union-attr]

    gathered: Carry = tree_map(gather, carry)
    return gathered


def _restore(leaves: list[Tensor], module: MetaTraining) -> Carry:
    """This rank's slots out of all, with the tree structure that the rule gives its state."""
    theta = leaves[0]
    share = len(theta) // module.trainer.world_size
    own = slice(module.trainer.global_rank * share, (module.trainer.global_rank + 1) * share)
    like = Carry(theta, module.rule.init_state(theta[:1]), theta, theta)
    carry: Carry = tree_map(lambda leaf: leaf[own].to(module.device), tree_unflatten(leaves, like))
    return carry
