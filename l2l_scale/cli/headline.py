"""What is said before a run starts."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from l2l_scale.training import MetaTraining, WindowData


def headline(model: MetaTraining, data: WindowData, trainer: L.Trainer, folder: Path) -> str:
    """What is about to run, in some lines."""
    size = sum(parameter.numel() for parameter in model.rule.parameters())
    sizes = [family.spec.size for family in data.mixture.families.values()]
    stored = dict.fromkeys(filter(None, map(model.rule.storage_for, sizes)))
    storage = "".join(f"{text}; " for text in stored)
    backends = "; ".join(dict.fromkeys(one.description for one in model.accelerated.values()))
    ranks = f" on {trainer.world_size} ranks" if trainer.world_size > 1 else ""
    shortest, longest = data.schedule.horizons[0], data.schedule.horizons[-1]
    horizon = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    return (
        f"meta-training {type(model.rule).__name__} ({size:,} parameters) on {_families(data)}\n"
        f"{data.slots} slots{ranks}, windows of {data.schedule.window} of a horizon of {horizon}, "
        f"{trainer.max_steps:,} meta-steps, seed {data.seed}\n"
        f"backend {backends}, {torch.get_num_threads()} CPU threads; {storage}run folder {folder}"
    )


def _families(data: WindowData) -> str:
    """What is trained on; the families of a mixture one by one."""
    mixture = data.mixture
    if data.family is not mixture:
        return str(data.family)
    slots, weights = mixture.slots(data.slots), mixture.weights
    lines = (
        f"\n  {name}: {family} ({len(slots[name])} slots, weight {weights[name]:.3g})"
        for name, family in mixture.families.items()
    )
    return f"{len(weights)} families, {mixture.placement}:" + "".join(lines)
