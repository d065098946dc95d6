"""Checkpoints: when they are written, what is kept, and that a run goes on from any of them bit for bit."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from test_meta_training import make_data, make_module

from l2l_scale.training import CheckpointError, Checkpoints, Trainer
from l2l_scale.training.checkpoints.folder import TRAINING, read_tensors
from l2l_scale.training.checkpoints.inflight import KEY


def fit(folder, max_steps=12, ckpt_path=None, callbacks=(), module=None, data=None, trainer=None, **settings):
    """Train; the trainer and its callback."""
    settings = {"every_n_meta_steps": 1, "keep_last": 99, **settings}
    checkpoints = Checkpoints(dirpath=str(folder / "checkpoints"), **settings)
    fitted = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[*callbacks, checkpoints],
        **{"max_epochs": -1, **(trainer or {})},
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


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_a_moment_that_is_no_boundary_is_made_up_for_soon(tmp_path):
    """After the last window of an epoch without validation nothing is written."""
    fit(tmp_path, 12, every_n_meta_steps=4, trainer={"limit_val_batches": 0})
    assert names(tmp_path) == ["step-00000005", "step-00000009", "step-00000012"]


def test_nothing_is_written_between_the_windows_of_a_meta_step(tmp_path):
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    fit(tmp_path / "straight", 4, trainer=settings)
    *earlier, end = sorted((tmp_path / "straight" / "checkpoints").glob("step-*"))
    for path in earlier:
        assert content(path)["[0][6].next_window"] % 2 == 0
        fit(tmp_path / path.name, 4, path, trainer=settings)
        assert differences(end, tmp_path / path.name / "checkpoints" / end.name) == []


def test_time_decides_where_no_number_is_given(tmp_path, monkeypatch):
    """Each look at the clock is a second later than the one before."""
    from l2l_scale.training.checkpoints import callback

    now = iter(range(1000))
    monkeypatch.setattr(callback.time, "monotonic", lambda: float(next(now)))
    settings = {"every_n_meta_steps": None, "max_share": 1.0}
    fit(tmp_path / "often", 8, **settings, every_seconds=0.0)
    assert len(names(tmp_path / "often")) >= 6
    fit(tmp_path / "seldom", 8, **settings, every_seconds=1000.0)
    assert names(tmp_path / "seldom") == ["step-00000008"]
    fit(tmp_path / "dear", 8, every_n_meta_steps=None, every_seconds=0.0, max_share=0.01)
    assert len(names(tmp_path / "dear")) == 2  # the first, of which nothing was known, and the last


def test_another_monitor_chooses_anew(tmp_path):
    _, first = fit(tmp_path, 8, monitor="valid/final")
    _, second = fit(tmp_path, 12, tmp_path / "checkpoints" / "last", monitor="valid/sum")
    assert first.retention.best["value"] != second.retention.best["value"]
    assert second.retention.best["meta_step"] == 12


def test_a_fresh_run_in_the_same_folder_deletes_nothing_of_another(tmp_path):
    fit(tmp_path, 6)
    before = names(tmp_path)
    fit(tmp_path, 12, keep_last=1, keep_best=0, every_n_meta_steps=4)
    assert {*before} - {"step-00000004"} <= {*names(tmp_path)}  # that one was replaced


def test_last_is_the_last_of_our_callback_or_a_fresh_start(tmp_path):
    assert fit(tmp_path, 4, "last")[0].global_step == 4
    _, checkpoints = fit(tmp_path, 8, "last")
    assert len(names(tmp_path)) == 8
    assert checkpoints._loaded is not None


class Numpy(Callback):
    """One whose state no checkpoint can hold."""

    def state_dict(self):
        return {"loss": np.float64(1.0)}


def test_what_could_not_be_read_again_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is a numpy\.float64 in it"):
        fit(tmp_path, 4, callbacks=[Numpy()])


def test_torchrun_in_a_job_of_slurm_is_left_to_itself(monkeypatch):
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}
    elastic = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    places = {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1"}
    for name, value in {**job, **places}.items():
        monkeypatch.setenv(name, value)
    found = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    environment = found._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    for name, value in elastic.items():
        monkeypatch.setenv(name, value)
    found = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert not isinstance(found._accelerator_connector.cluster_environment, SLURMEnvironment)


def test_a_run_of_epochs_can_be_made_longer(tmp_path):
    def run(epochs, ckpt_path=None):
        module = make_module(final_fraction=1.0)
        return fit(tmp_path / str(epochs), -1, ckpt_path, module=module, trainer={"max_epochs": epochs})

    run(4)
    run(2)
    fit(
        tmp_path / "longer",
        -1,
        tmp_path / "2" / "checkpoints" / "last",
        module=make_module(final_fraction=1.0),
        trainer={"max_epochs": 4},
    )
    ends = [tmp_path / name / "checkpoints" / "step-00000016" for name in ("4", "longer")]
    phi = [read_tensors(end / TRAINING)["state_dict"] for end in ends]
    assert all(torch.equal(phi[0][name], phi[1][name]) for name in phi[0])
