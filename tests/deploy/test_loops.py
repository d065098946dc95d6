"""The optimizer in the loops that people have: Lightning, autocast, compiled models, DDP."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from l2l_scale.deploy import LearnedOptimizer
from l2l_scale.optimizers import CoordinatewiseLSTM, RNNprop, TanhExp

BATCH = 8
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(3))
Y = X @ torch.randn(5, 3, generator=torch.Generator().manual_seed(4))


def learned():
    """A rule that moves θ, with random weights; its updates are small enough not to diverge."""
    torch.manual_seed(0)
    return CoordinatewiseLSTM(8, 2, RNNprop(), TanhExp(0.1, 1.0), output_scale=1.0)


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def weights(net):
    return torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])


def loop(net, steps, clip=None, scheduled=False, forward=None):
    """A plain training loop over the batches of (X, Y), the reference for all others; the weights."""
    optimizer = LearnedOptimizer(net.parameters(), learned())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    for step in range(steps):
        part = slice(step % BATCH * BATCH, (step % BATCH + 1) * BATCH)
        optimizer.zero_grad()
        F.mse_loss((forward or net)(X[part]), Y[part]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if scheduled:
            scheduler.step()
    return weights(net)


class Module(L.LightningModule):
    """What a user of Lightning writes."""

    def __init__(self, scheduled=False):
        super().__init__()
        self.net, self.scheduled = model(), scheduled

    def training_step(self, batch, index):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        optimizer = LearnedOptimizer(self.net.parameters(), learned())
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, folder, steps, ckpt_path=None, batch=BATCH, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=batch), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}], ids=["plain", "clipped"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
def test_lightning_does_what_a_plain_loop_does(tmp_path, options, scheduled):
    module = Module(scheduled)
    fit(module, tmp_path, 12, **options)
    assert torch.equal(weights(module.net), loop(model(), 12, options.get("gradient_clip_val"), scheduled))


def test_lightning_resumes_the_optimizer_exactly(tmp_path):
    # all data at every step: where it goes on in an epoch is Lightning's affair
    fit(Module(), tmp_path, 8, batch=len(X)).save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    resumed, straight = Module(), Module()
    fit(resumed, tmp_path, 16, batch=len(X), ckpt_path=tmp_path / "x.ckpt")
    fit(straight, tmp_path, 16, batch=len(X))
    assert torch.equal(weights(resumed.net), weights(straight.net))


def test_lightning_in_bf16_mixed_precision(tmp_path):
    module = Module()
    fit(module, tmp_path, 8, precision="bf16-mixed")

    net = model()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    # the loss is computed in float32 in the plain loop, under autocast in Lightning's
    torch.testing.assert_close(weights(module.net), loop(net, 8, forward=forward), rtol=0, atol=1e-6)
    assert not torch.equal(weights(module.net), loop(model(), 8))


def test_compiled_models_train_as_others_do():
    net = model()
    forward = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(loop(net, 12, forward=forward), loop(model(), 12), rtol=0, atol=1e-5)


def rank_main(rank, folder):
    """One of two ranks, which train on half of every batch each."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    net = DistributedDataParallel(model())
    optimizer = LearnedOptimizer(net.parameters(), learned())
    for step in range(12):
        start = step % BATCH * BATCH + rank * BATCH // 2
        part = slice(start, start + BATCH // 2)
        optimizer.zero_grad()
        F.mse_loss(net(X[part]), Y[part]).backward()
        optimizer.step()
    torch.save(weights(net), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # a process that has had gloo and DDP now and then hangs while Python tidies up


def test_ddp_ranks_stay_equal_and_do_what_one_process_does(tmp_path):
    code = "import sys, test_loops; test_loops.rank_main(int(sys.argv[1]), sys.argv[2])"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}:{here}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, loop(model(), 12), rtol=0, atol=1e-5)
