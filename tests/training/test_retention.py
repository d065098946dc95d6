"""Which checkpoints are kept, and which φ is the best."""

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_checkpoints import fit
from test_meta_training import make_data

from l2l_scale.training.checkpoints.folder import TRAINING, read_tensors
from l2l_scale.training.checkpoints.shelf import checkpoints_in


class Values(Callback):
    """Logs what the n-th validation is to come to; stands before Checkpoints."""

    def __init__(self, values):
        self.values = values

    def on_validation_epoch_end(self, trainer, module):
        module.log("valid/mine", float(self.values[trainer.global_step // 2 - 1]))


def names(folder):
    return [int(path.name.removeprefix("step-")) for path in checkpoints_in(folder / "checkpoints")]


def run(folder, values, steps=None, ckpt_path=None, max_steps=12, **settings):
    """A run with a validation after every second meta-step, and a checkpoint after each meta-step."""
    return fit(
        folder,
        max_steps,
        ckpt_path,
        callbacks=[Values(values)],
        data=make_data(windows_per_epoch=2),
        **{"monitor": "valid/mine", "keep_last": 1, **settings},
    )


VALUES = [3.0, 1.0, 2.0, 1.0, 5.0, 4.0]  # after 2, 4, ..., 12 meta-steps


@pytest.mark.parametrize(
    ("settings", "kept", "best"),
    [
        ({"keep_last": 1, "keep_best": 0}, [12], 4),
        ({"keep_last": 3, "keep_best": 0}, [8, 10, 12], 4),
        ({"keep_last": 1, "keep_best": 1}, [4, 12], 4),
        ({"keep_last": 1, "keep_best": 3}, [4, 6, 8, 12], 4),
        ({"keep_last": 1, "keep_best": 1, "mode": "max"}, [10, 12], 10),
        ({"keep_last": 2, "keep_best": 2, "mode": "max"}, [10, 12], 10),
    ],
)
def test_the_last_and_the_best_are_kept_and_no_others(tmp_path, settings, kept, best):
    _, checkpoints = run(tmp_path, VALUES, **{"every_n_meta_steps": 2, **settings})
    assert names(tmp_path) == kept
    assert checkpoints.retention.best["meta_step"] == best
    assert checkpoints.retention.best["value"] == VALUES[best // 2 - 1]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_never_the_best_but_where_there_is_nothing_else(tmp_path, mode):
    values = [math.nan, math.inf if mode == "min" else -math.inf, 7.0, math.nan, 7.0, math.nan]
    _, checkpoints = run(tmp_path, values, mode=mode, every_n_meta_steps=2)
    assert (checkpoints.retention.best["meta_step"], checkpoints.retention.best["value"]) == (6, 7.0)
    assert names(tmp_path) == [6, 12]
    _, checkpoints = run(tmp_path / "only", [math.nan] * 6, mode=mode)
    assert checkpoints.retention.best["meta_step"] == 2


def test_best_phi_is_that_of_its_meta_step_and_survives_resuming(tmp_path):
    run(tmp_path / "all", VALUES, keep_last=99)
    at_best = read_tensors(tmp_path / "all" / "checkpoints" / "step-00000004" / TRAINING)["state_dict"]
    for step in (5, 7, 11):
        path = tmp_path / "all" / "checkpoints" / f"step-{step:08d}"
        _, checkpoints = run(tmp_path / str(step), VALUES, ckpt_path=path)
        assert checkpoints.retention.best["meta_step"] == 4
        saved = read_tensors(checkpoints.dirpath / "step-00000012" / TRAINING)
        best = saved["callbacks"]["Checkpoints"]["best"]["phi"]
        assert best.keys() == at_best.keys()
        assert all(torch.equal(best[name], at_best[name]) for name in best)
        assert any(not torch.equal(best[name], saved["state_dict"][name]) for name in best)


def test_monitor_that_is_not_logged_is_named_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint\.monitor \(valid/smu\) is not logged; .*valid/sum"):
        fit(tmp_path, 8, monitor="valid/smu")


def test_newer_checkpoints_than_the_one_resumed_from_are_left_alone_for_good(tmp_path):
    run(tmp_path, VALUES, keep_last=99)
    folder = tmp_path / "checkpoints"
    run(tmp_path, VALUES, ckpt_path=folder / "step-00000007", max_steps=8)  # 8 is written anew
    assert set(names(tmp_path)) >= {8, 9, 10, 11, 12}
    assert names(tmp_path)[-1] == 8  # the last one by order of writing
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*step-")
        trainer, _ = run(tmp_path, VALUES, ckpt_path=folder / "last", max_steps=10, keep_best=0)
    assert trainer.global_step == 10
    assert set(names(tmp_path)) == {11, 12, 10}  # 9 and 10 were written anew, and 9 was ours to delete


def test_newer_ones_are_known_by_a_link_to_the_folder_too(tmp_path):
    run(tmp_path / "real", VALUES, keep_last=99)
    (tmp_path / "link").symlink_to("real")
    path = tmp_path / "real" / "checkpoints" / "step-00000007"
    run(tmp_path / "link", VALUES, ckpt_path=path, max_steps=8)
    assert set(names(tmp_path / "real")) >= {9, 10, 11, 12}


def test_checkpoint_with_a_name_of_its_own_in_the_same_folder(tmp_path):
    run(tmp_path, VALUES, keep_last=99)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000007").rename(folder / "good")
    run(tmp_path, VALUES, ckpt_path=folder / "good", max_steps=8)
    assert (folder / "good").is_dir()
    assert set(names(tmp_path)) >= {9, 10, 11, 12}


def test_damaged_newer_ones_are_not_deleted(tmp_path):
    run(tmp_path, VALUES, keep_last=99)
    folder = tmp_path / "checkpoints"
    for step in (11, 12):
        (folder / f"step-{step:08d}" / TRAINING).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"00012.*00011.*Taking .*step-00000010, which is whole"):
        run(tmp_path, VALUES, ckpt_path=folder / "last", max_steps=10)
    assert set(names(tmp_path)) >= {11, 12}


@pytest.mark.parametrize("max_steps", [12, 14])  # with nothing left to train, and with something
def test_what_a_killed_run_did_not_delete_is_deleted_when_it_goes_on(tmp_path, monkeypatch, max_steps):
    values = [*VALUES, 6.0]
    with monkeypatch.context() as patch:
        patch.setattr("l2l_scale.training.checkpoints.shelf.prune", lambda *_: None)
        run(tmp_path, values)
    assert len(names(tmp_path)) == 12
    (tmp_path / "checkpoints" / "last").unlink()  # nor had it set the link
    (tmp_path / "checkpoints" / "last").symlink_to("step-00000003")
    run(tmp_path, values, ckpt_path=tmp_path / "checkpoints" / "last", max_steps=max_steps)
    assert names(tmp_path) == [4, max_steps]
    assert (tmp_path / "checkpoints" / "last").resolve().name == f"step-{max_steps:08d}"
