"""What ranks do together: gather losses, agree, and make sure that they train the same rule."""

from __future__ import annotations

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from l2l_scale.training.data import WindowData


def rank() -> int:
    """This process's number; 0 if it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_slots(module: L.LightningModule, losses: Tensor) -> Tensor:
    """Collective. Losses (T, S) of every rank's slots, as many on each, in the order of the ranks."""
    if world_size() == 1:
        return losses
    joined = torch.cat(_all_gather(losses), dim=1)
    data = module.trainer.datamodule  # type: ignore[attr-defined]
    # What makes the ranks' shares even is none of the validation tasks.
    return joined[:, : data.valid_tasks] if isinstance(data, WindowData) else joined


def _all_gather(own: Tensor) -> list[Tensor]:
    """Collective. A tensor of every rank, of one shape on all."""
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own.contiguous())
    return everyone


def most_of_all_ranks(module: L.LightningModule, count: int) -> int:
    """Collective. The largest of the ranks' counts."""
    if world_size() == 1:
        return count
    return max(int(other) for other in _all_gather(torch.tensor(count, device=module.device)))


def check_same_phi(module: L.LightningModule) -> None:
    """Collective. Raise ``RuntimeError`` if φ is not the same bits on every rank.

    A rank that went its own way, after a fault of memory or of a network, would spoil a run silently.
    """
    if world_size() == 1:
        return
    hashes = torch.stack(_all_gather(hash_of(list(module.parameters()))))
    others = (hashes != hashes[0]).nonzero().flatten().tolist()
    if others:
        raise RuntimeError(
            f"φ on rank(s) {', '.join(map(str, others))} is not that of rank 0 at meta-step "
            f"{module.global_step}: resume from the last checkpoint, and suspect the machine of that rank"
        )


def hash_of(tensors: list[Tensor]) -> Tensor:
    """A number that changes with any bit of any of the tensors and with their order, () int64.

    Σ bits_i · (2i + 1) modulo 2^64, over bytes: odd factors let no single change vanish.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    start = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8).to(torch.int64)
        factors = 2 * torch.arange(start, start + len(bits), device=bits.device) + 1
        total = total + (bits * factors).sum()
        start += len(bits)
    return total
