"""What Lightning does not save: the tasks in flight, the window counter, and what the rule is.

A checkpoint holds only tensors and plain types, so it loads without executing anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from l2l_scale.deploy import describe_rule
from l2l_scale.training.data import WindowData
from l2l_scale.training.ranks import gather_carries
from l2l_scale.tree import tree_leaves, tree_map, tree_unflatten
from l2l_scale.unroll import Carry

if TYPE_CHECKING:
    from l2l_scale.training.module import MetaTraining

KEY = "l2l_scale"


def save(checkpoint: dict[str, Any], module: MetaTraining) -> None:
    """Collective. Write the in-flight state of every rank's slots into ``checkpoint``."""
    carries = gather_carries(module, module.carries)
    checkpoint[KEY] = {
        "rule": describe_rule(module.rule),
        "family": repr(module.source),
        "data": _describe_data(module),
        "next_window": module.next_window,
        "windows_lost": module.windows_lost,
        "num_diverged": module.num_diverged,
        "num_skipped": module.num_skipped,
        # None on the ranks that write nothing.
        "carries": carries and {name: tree_leaves(carry) for name, carry in carries.items()},
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
    if saved["carries"]:
        module.carries = dict(_restore(saved["carries"], module))


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
    return data.describe() if isinstance(data, WindowData) else {}


def _restore(carries: dict[str, list[Tensor]], module: MetaTraining) -> Iterator[tuple[str, Carry]]:
    """This rank's slots out of all, with the tree structure that the rule gives its state."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, WindowData):
        seats = data.seats(module.trainer.global_rank, module.trainer.world_size)
        starts = {name: slots.start for name, slots in data.mixture.slots(data.slots).items()}
        own = {
            seat.member: slice(seat.slots.start - starts[seat.member], seat.slots.stop - starts[seat.member])
            for seat in seats
        }
    else:
        own = dict.fromkeys(carries, slice(None))
    for name, place in own.items():
        theta = carries[name][0]
        like = Carry(theta, module.rule.init_state(theta[:1]), theta, theta)
        whole = tree_unflatten(carries[name], like)
        yield name, tree_map(lambda leaf, place=place: leaf[place].to(module.device), whole)
