"""Checkpoints: when they are written, what is kept, and that a run goes on from any of them bit for bit."""

from itertools import pairwise

import pytest
import torch
from test_meta_training import make_data, make_module

from l2l_scale.training import Checkpoints, Trainer
from l2l_scale.training.checkpoints.folder import TRAINING, read_tensors
from l2l_scale.training.checkpoints.inflight import KEY


def fit(folder, max_steps=12, ckpt_path=None, callbacks=(), module=None, data=None, trainer=None, **settings):
    """Train; the trainer and its callback."""
    settings = {"every_n_meta_steps": 1, "keep_last": 99, **settings}
    checkpoints = Checkpoints(dirpath=str(folder / "checkpoints"), **settings)
    fitted = Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[*callbacks, checkpoints],
        **(trainer or {}),
    )
    fitted.fit(module or make_module(), datamodule=data or make_data(), ckpt_path=ckpt_path)
    return fitted, checkpoints


def content(path):
    """All that decides how a run goes on, flat."""
    saved = read_tensors(path / TRAINING)
    slots = [read_tensors(file) for file in sorted(path.glob("slots-*"))]
    kept = (
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "loops",
        "global_step",
        "epoch",
        KEY,
        "WindowData",
    )
    best = saved["callbacks"]["Checkpoints"]["best"]
    return dict(flat(([saved.get(name) for name in kept], slots, best)))


def flat(tree, path=""):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{path}.{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from flat(value, f"{path}[{i}]")
    else:
        yield path, tree


def differences(a, b):
    """Names of what differs between two checkpoints in a single bit."""
    one, two = content(a), content(b)
    return [
        name
        for name in sorted(one.keys() | two.keys())
        if not (
            torch.equal(one[name], two[name])
            if isinstance(one.get(name), torch.Tensor) and isinstance(two.get(name), torch.Tensor)
            else name in one and name in two and one[name] == two[name]
        )
    ]


RHYTHMS = {
    "validation after every epoch": {},
    "after every second": {"check_val_every_n_epoch": 2},
    "none": {"limit_val_batches": 0},
    "twice per epoch": {"val_check_interval": 2},
    "two windows per meta-step": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_a_run_goes_on_from_any_checkpoint_bit_for_bit(tmp_path, rhythm):
    settings = RHYTHMS[rhythm]
    steps = 12 // settings.get("accumulate_grad_batches", 1)
    fit(tmp_path / "straight", steps, trainer=settings)
    *earlier, end = sorted((tmp_path / "straight" / "checkpoints").glob("step-*"))
    assert end.name == f"step-{steps:08d}"
    assert len(earlier) >= steps * 2 // 3
    for path in earlier:
        module = make_module()
        torch.nn.init.zeros_(next(module.parameters()))
        fit(tmp_path / path.name, steps, path, module=module, trainer=settings)
        assert differences(end, tmp_path / path.name / "checkpoints" / end.name) == []
    for before, path in list(pairwise(earlier))[::3]:  # and once more, from what such a run wrote
        fit(tmp_path / "again", steps, tmp_path / before.name / "checkpoints" / path.name, trainer=settings)
        assert differences(end, tmp_path / "again" / "checkpoints" / end.name) == []
