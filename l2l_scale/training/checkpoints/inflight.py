"""What Lightning does not save: the tasks in flight, the window counter, and what the run is.

All of it is tensors and plain types, so it loads without executing anything.
"""

from __future__ import annotations

import warnings
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l2l_scale.deploy import describe_rule
from l2l_scale.training.data import WindowData
from l2l_scale.tree import tree_leaves, tree_map, tree_unflatten
from l2l_scale.unroll import Carry

if TYPE_CHECKING:
    from l2l_scale.training.module import MetaTraining

KEY = "l2l_scale"
SLOTS = "slots"
"""Below KEY: what each rank had in flight, ``[{family: {"first": its first slot, "leaves": []}}, ...]``."""
COUNTERS = ("next_window", "windows_lost", "num_diverged", "num_skipped")


def save(checkpoint: dict[str, Any], module: MetaTraining) -> None:
    """Add what this rank has in flight, and what the run is."""
    first = {name: place.start for name, place in _own_slots(module).items()}
    own = {
        name: {"first": first[name], "leaves": tree_leaves(carry)} for name, carry in module.carries.items()
    }
    checkpoint[KEY] = {
        "rule": describe_rule(module.rule),
        "family": repr(module.source),
        "data": _describe_data(module),
        "model": module.describe(),
        "trainer": _describe_trainer(module),
        **{name: getattr(module, name) for name in COUNTERS},
        SLOTS: [own],
    }


def load(checkpoint: dict[str, Any], module: MetaTraining) -> None:
    """Take up what was in flight in this rank's slots.

    Raises:
        ValueError: if the checkpoint is not ours, or is one of another rule or other data.
    """
    if KEY not in checkpoint:
        raise ValueError(
            "this checkpoint was not written by l2l_scale; give one of a run folder's checkpoints/"
        )
    saved = checkpoint[KEY]
    parts = {"rule": describe_rule(module.rule), "data": _describe_data(module), "model": module.describe()}
    for name, now in parts.items():
        difference = first_difference(saved.get(name), now, name)
        if difference:
            raise ValueError(
                f"the checkpoint is one of another run: {difference}. Resume with the run's own config.yaml, "
                "or start a new run without --ckpt_path"
            )
    difference = first_difference(saved["trainer"], _describe_trainer(module), "trainer")
    if difference:
        warnings.warn(f"{difference}: from here on the run is not what it would have been", stacklevel=2)
    for name in COUNTERS:
        setattr(module, name, saved[name])
    if module.next_window > 0:
        module.carries = {
            name: _restore(name, place, saved[SLOTS], module) for name, place in _own_slots(module).items()
        }


def first_difference(saved: Any, now: Any, path: str) -> str:
    """Name the first entry in which two nested descriptions differ; empty if they are equal."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(saved.keys() | now.keys()):
            found = first_difference(saved.get(key), now.get(key), f"{path}.{key}")
            if found:
                return found
        return ""
    return "" if saved == now else f"{path} is {saved!r} there and {now!r} here"


def settings_of(part: Any) -> Any:
    """What an object without a description of its own is, in plain types: its class and public attributes."""
    if isinstance(part, Enum):
        return part.name
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, list | tuple):
        return [settings_of(value) for value in part]
    attributes = {} if isinstance(part, Tensor) else getattr(part, "__dict__", {})
    public = {name: settings_of(value) for name, value in attributes.items() if not name.startswith("_")}
    return {"class": type(part).__name__, **public}


def _describe_data(module: MetaTraining) -> dict[str, Any]:
    """What the windows depend on; nothing where they do not come from our data module."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    return data.describe() if isinstance(data, WindowData) else {}


def _describe_trainer(module: MetaTraining) -> dict[str, Any]:
    """What may change when a run is resumed, and what comes out then changes as well."""
    trainer = module.trainer
    return {
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        # The learning rate falls until then.
        "max_steps": trainer.max_steps if module.final_fraction < 1 else None,
    }


def _own_slots(module: MetaTraining) -> dict[str, slice]:
    """This rank's slots of each of its families, numbered within the family over all ranks."""
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, WindowData):
        return {name: slice(0, None) for name in module.families}
    seats = data.seats(module.trainer.global_rank, module.trainer.world_size)
    starts = {name: slots.start for name, slots in data.mixture.slots(data.slots).items()}
    return {
        seat.member: slice(seat.slots.start - starts[seat.member], seat.slots.stop - starts[seat.member])
        for seat in seats
    }


def _restore(name: str, place: slice, ranks: list[dict[str, Any]], module: MetaTraining) -> Carry:
    """This rank's slots of a family, with the tree structure that the rule gives its state.

    Raises:
        ValueError: if the checkpoint does not have them all.
    """
    pieces = sorted((rank[name] for rank in ranks if name in rank), key=lambda piece: int(piece["first"]))
    leaves = [_slots_of(pieces, i, place, name) for i in range(len(pieces[0]["leaves"]))] if pieces else []
    if not leaves:
        raise ValueError(f"the checkpoint has no slots of {name or 'the family'} in flight")
    theta = leaves[0]
    rule = module.rule.for_spec(module.families[name].spec)
    like = Carry(theta, rule.init_state(theta[:1]), theta, theta)
    carry: Carry = tree_map(lambda leaf: leaf.to(module.device), tree_unflatten(leaves, like))
    return carry


def _slots_of(pieces: list[dict[str, Any]], leaf: int, place: slice, name: str) -> Tensor:
    """A copy of some slots of a leaf, out of the pieces that the ranks wrote."""
    found, at = [], place.start
    for piece in pieces:
        tensor, first = piece["leaves"][leaf], int(piece["first"])
        stop = first + len(tensor) if place.stop is None else min(first + len(tensor), place.stop)
        if first <= at < stop:
            found.append(tensor[at - first : stop - first])
            at = stop
    if not found or (place.stop is not None and at < place.stop):
        raise ValueError(
            f"the checkpoint holds {name or 'the'} slots up to {at} only, not those from {place.start} to "
            f"{place.stop}: it was written by one of several ranks. Write checkpoints with "
            "l2l_scale.training.Trainer, which asks all of them"
        )
    return torch.cat(found)
