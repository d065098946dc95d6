"""What ranks do together, between two real processes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from l2l_scale.training.ranks import all_slots, check_same_phi, hash_of, rank, world_size

TENSORS = [torch.arange(6.0).reshape(2, 3), torch.tensor(0.5), torch.tensor([1, 2, 3], dtype=torch.bfloat16)]


def copies():
    return [tensor.clone() for tensor in TENSORS]


def test_equal_tensors_have_equal_hashes():
    assert torch.equal(hash_of(copies()), hash_of(TENSORS))
    assert hash_of(TENSORS).dtype is torch.int64
    assert hash_of(TENSORS).shape == ()
    transposed = TENSORS[0].T.contiguous().T  # the same numbers, laid out otherwise
    assert torch.equal(hash_of([transposed]), hash_of(TENSORS[:1]))
    assert torch.equal(hash_of([nn.Parameter(TENSORS[0])]), hash_of(TENSORS[:1]))


def test_every_bit_changes_the_hash():
    hashes = {int(hash_of(TENSORS))}
    bits = 0
    for place, tensor in enumerate(TENSORS):
        for byte in range(tensor.numel() * tensor.element_size()):
            for bit in range(8):
                changed = copies()
                changed[place].view(-1).view(torch.uint8)[byte] ^= 1 << bit
                hashes.add(int(hash_of(changed)))
                bits += 1
    assert bits == 8 * (24 + 4 + 6)
    assert len(hashes) == bits + 1


def test_order_changes_the_hash():
    assert hash_of(TENSORS[::-1]) != hash_of(TENSORS)
    assert hash_of([TENSORS[0].flip(1), *TENSORS[1:]]) != hash_of(TENSORS)
    assert hash_of([torch.tensor(0.0), torch.tensor(-0.0)]) != hash_of(
        [torch.tensor(-0.0), torch.tensor(0.0)]
    )


def test_a_rank_alone_has_everything_itself():
    alone = SimpleNamespace(_trainer=None)
    losses = torch.rand(3, 2)
    assert (rank(), world_size()) == (0, 1)
    assert all_slots(alone, losses) is losses
    check_same_phi(alone)


class Module(nn.Module):
    """The part of a LightningModule that ranks look at."""

    def __init__(self, rank, datamodule=None):
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([1.0, 2.0]))
        self._trainer = self.trainer = SimpleNamespace(world_size=2, global_rank=rank, datamodule=datamodule)
        self.global_step = 7


def work(own_rank, file):
    """What each of the two processes checks."""
    from test_meta_training import make_data

    torch.distributed.init_process_group("gloo", f"file://{file}", rank=own_rank, world_size=2)
    module = Module(own_rank)

    losses = torch.arange(6.0).reshape(3, 2) + 100 * own_rank
    joined = torch.cat([losses - 100 * own_rank, losses - 100 * own_rank + 100], dim=1)
    assert torch.equal(all_slots(module, losses.T.contiguous().T), joined)
    cut = Module(own_rank, make_data(valid_tasks=3))
    assert torch.equal(all_slots(cut, losses), joined[:, :3])

    check_same_phi(module)
    with torch.no_grad():
        module.phi[1] += own_rank * 2**-22  # the last bit
    with pytest.raises(RuntimeError, match=r"φ on rank\(s\) 1 is not that of rank 0 at meta-step 7"):
        check_same_phi(module)
    torch.distributed.barrier()
    os._exit(0)  # a process that has had gloo now and then hangs or aborts while Python tidies up


def test_two_ranks_gather_losses_and_notice_another_phi(tmp_path):
    code = "import sys, test_ranks; test_ranks.work(int(sys.argv[1]), sys.argv[2])"
    tests = Path(__file__).parents[1]
    path = {"PYTHONPATH": ":".join(map(str, (tests.parent, tests, tests / "training")))}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "meet")],
            env={**os.environ, **path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
