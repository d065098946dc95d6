"""Damaged, foreign and malicious checkpoints: what is damaged is named, and nothing is executed."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_checkpoints import differences, fit
from test_meta_training import make_data, make_module

from l2l_scale.estimators import LogLoss, TruncatedBPTT
from l2l_scale.sampling import PoolSettings
from l2l_scale.training import Checkpoints, Trainer
from l2l_scale.training.checkpoints import CheckpointError, DamagedError, shelf
from l2l_scale.training.checkpoints.folder import (
    _digest,
    draft_of,
    read_manifest,
    read_tensors,
    write_tensors,
)
from l2l_scale.training.checkpoints.inflight import KEY

STEPS = 6
SLOTS = "slots-00000-of-00001.pt"
FILES = ("manifest.json", "training.pt", SLOTS, "config.yaml")


class Config(Callback):
    """Puts a configuration into every checkpoint, as the command line does."""

    def on_train_start(self, trainer, module):
        trainer.texts["config.yaml"] = "answer: 42\n" * 100


def go_on(folder, ckpt_path):
    """The run that was stopped, with a φ of its own that must not matter."""
    module = make_module()
    torch.nn.init.zeros_(next(module.parameters()))
    return fit(folder, STEPS, ckpt_path, callbacks=[Config()], module=module)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run with a checkpoint after every meta-step."""
    folder = tmp_path_factory.mktemp("straight")
    fit(folder, STEPS, callbacks=[Config()])
    return folder


@pytest.fixture
def stopped(straight, tmp_path):
    """The checkpoints of the same run, as if it had been stopped after meta-step 3."""
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in range(4, STEPS + 1):
        shutil.rmtree(checkpoints / f"step-{step:08d}")
    shelf.point_to(checkpoints / "step-00000003")
    return checkpoints


def flip(position):
    """Flips a bit at a share of the length of a file."""

    def damage(file):
        content = bytearray(file.read_bytes())
        content[min(int(position * len(content)), len(content) - 1)] ^= 1 << 3
        file.write_bytes(content)

    return damage


def cut(share):
    """Leaves the beginning of a file."""
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


DAMAGES = {
    "truncated": cut(0.6),
    "without its end": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "empty": cut(0),
    "missing": Path.unlink,
    **{f"a bit flipped at {place}": flip(place) for place in (0, 0.1, 0.5, 0.9, 1)},
}


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_goes_on_from_the_one_before(stopped, straight, names):
    """``last`` names the damage, takes the checkpoint before it, and ends as the undisturbed run."""
    with pytest.warns(UserWarning, match=names) as warned:
        go_on(stopped.parent, stopped / "last")
    assert any("Taking" in str(one.message) and "step-00000002" in str(one.message) for one in warned)
    end = f"checkpoints/step-{STEPS:08d}"
    assert differences(straight / end, stopped.parent / end) == []


def assert_refused(path, names):
    """Named explicitly it is refused by name, and nothing is touched."""
    before = contents(path.parent)
    with pytest.raises(DamagedError, match=names) as refused:
        go_on(path.parent.parent, path)
    assert isinstance(refused.value, ValueError)
    assert path.name in str(refused.value)
    assert contents(path.parent) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_run_goes_on_from_the_checkpoint_before(straight, stopped, name, damage):
    damaged = stopped / "step-00000003"
    DAMAGES[damage](damaged / name)
    named = f"step-00000003.*{name}|step-00000003.*not a checkpoint of l2l_scale"
    assert_refused(damaged, named)
    assert_goes_on_from_the_one_before(stopped, straight, named)


def newer_version(path):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    seal(path, {**manifest, "version": 2, "versions": {"l2l_scale": "99.0"}})


def foreign_folder(path):
    shutil.rmtree(path)
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def foreign_manifest(path):
    (path / "manifest.json").write_text(json.dumps({"name": "an app", "version": "2"}))


def foreign_list(path):
    (path / "manifest.json").write_text("[1, 2]")


def foreign_file(path):
    shutil.rmtree(path)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, path)


def only_a_draft(path):
    path.rename(draft_of(path))
    (path.parent / "last").unlink()


def without_fields(path):
    """A manifest with a good checksum that lacks what every manifest of ours has."""
    manifest = json.loads((path / "manifest.json").read_text())
    seal(path, {name: manifest[name] for name in ("format", "version")})


def no_training(path):
    """A checkpoint whose manifest knows of no training.pt."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"], manifest["files"]["training.pt"]
    seal(path, manifest)


FOREIGN = {
    "a newer version": (newer_version, r"format version 2.*knows up to 1.*l2l_scale 99\.0: upgrade"),
    "another folder": (foreign_folder, r"step-00000003 is not a checkpoint of l2l_scale: it has no manifest"),
    "another manifest": (foreign_manifest, "step-00000003 is not a checkpoint of l2l_scale"),
    "a list": (foreign_list, "step-00000003 is not a checkpoint of l2l_scale"),
    "a file of Lightning": (
        foreign_file,
        r"step-00000003 is not a checkpoint of l2l_scale, which are folders",
    ),
    "no fields": (without_fields, r"step-00000003.*manifest\.json.* lacks"),
    "no training.pt": (no_training, r"step-00000003.*manifest\.json.* lacks training\.pt"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_named_and_the_run_goes_on(straight, stopped, kind):
    make, names = FOREIGN[kind]
    make(stopped / "step-00000003")
    assert_refused(stopped / "step-00000003", names)
    if (stopped / "step-00000003").is_file():  # nothing that we would replace
        with pytest.raises(
            CheckpointError, match=r"cannot write .*step-00000003: Not a directory; .*00000002"
        ):
            go_on(stopped.parent, stopped / "last")
        (stopped / "step-00000003").rename(stopped / "step-x")
        names = r"step-x is not a checkpoint of l2l_scale, which are folders"
    assert_goes_on_from_the_one_before(stopped, straight, names)


def test_a_draft_is_no_checkpoint_and_is_swept_away(straight, stopped):
    only_a_draft(stopped / "step-00000003")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*step-")
        go_on(stopped.parent, stopped / "last")
    assert not list(stopped.glob(".step-*"))
    assert differences(straight / "checkpoints/step-00000006", stopped / "step-00000006") == []


def test_where_all_are_damaged_the_way_out_is_said(stopped):
    for step in (1, 2, 3):
        cut(0.5)(stopped / f"step-{step:08d}" / "training.pt")
    before = contents(stopped)
    with pytest.raises(DamagedError, match=r"no checkpoint in .* is whole: .*00003.*00002.*00001.*overwrite"):
        go_on(stopped.parent, stopped / "last")
    assert contents(stopped) == before


def test_several_damaged_ones_are_all_named(straight, stopped):
    flip(0.3)(stopped / "step-00000003" / SLOTS)
    (stopped / "step-00000002" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"00002.*00003.*Taking .*step-00000001, which is whole"):
        go_on(stopped.parent, stopped / "last")
    assert differences(straight / "checkpoints/step-00000006", stopped / "step-00000006") == []


def test_the_link_is_not_needed_and_may_point_anywhere(straight, stopped):
    for target in (None, "nowhere", "step-00000001", "../.."):
        (stopped / "last").unlink(missing_ok=True)
        if target is not None:
            (stopped / "last").symlink_to(target)
        path, manifest = shelf.last_whole(stopped, read_manifest)
        assert path.name == "step-00000003"
        assert manifest["meta_step"] == 3


def seal(path, manifest):
    """Write a manifest with the checksum that belongs to it."""
    text = json.dumps({**manifest, "sha256": _digest(manifest)})
    (path / "manifest.json").write_text(text)


def forge(path, name, payload):
    """Put other content into a file of a checkpoint, and let the manifest agree."""
    (path / name).write_bytes(payload)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    seal(path, manifest)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


PAYLOADS = {
    "torch": lambda target: saved({"state_dict": {}, KEY: Command(target)}),
    "torch, old format": lambda target: saved(Command(target), _use_new_zipfile_serialization=False),
    "pickle": lambda target: pickle.dumps(Command(target)),
    "import": lambda target: b"\x80\x02cevil_module\nattribute\n.",
    "import of what Lightning redirects": lambda target: b"\x80\x02cpytorch_lightning.evil_module\nx\n.",
    "eval": lambda target: b"c__builtin__\neval\n(S'open(%r, \"w\")'\ntR." % str(target).encode(),
}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A file that is there once a payload was executed, or the module that it names was imported."""
    target = tmp_path / "executed"
    (tmp_path / "evil_module.py").write_text(f"open({str(target)!r}, 'w')\nattribute = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield target
    assert not target.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["training.pt", SLOTS])
def test_malicious_file_executes_nothing_and_is_refused(straight, stopped, evil, name, payload):
    forge(stopped / "step-00000003", name, PAYLOADS[payload](evil))
    named = f"step-00000003.*{name} cannot be read as tensors and plain types"
    assert_refused(stopped / "step-00000003", named)
    assert_goes_on_from_the_one_before(stopped, straight, named)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_malicious_file_instead_of_a_checkpoint_executes_nothing(tmp_path, evil, payload):
    (tmp_path / "x.ckpt").write_bytes(PAYLOADS[payload](evil))
    with pytest.raises(DamagedError, match=r"x\.ckpt is not a checkpoint of l2l_scale"):
        go_on(tmp_path, tmp_path / "x.ckpt")


ODD = {
    "a list": [1, 2],
    "a tensor": torch.zeros(3),
    "nothing of Lightning's": {KEY: {}},
    "nothing of ours": {"pytorch-lightning_version": "2.6.6", "state_dict": {}, "global_step": 3},
}


@pytest.mark.parametrize("kind", ODD)
def test_other_content_with_good_checksums_is_refused(stopped, kind):
    forge(stopped / "step-00000003", "training.pt", saved(ODD[kind]))
    with pytest.raises(ValueError, match=r"not .* by l2l_scale|no checkpoint of a run"):
        go_on(stopped.parent, stopped / "step-00000003")


def test_slots_that_are_none_are_refused(stopped):
    forge(stopped / "step-00000003", SLOTS, saved([{"": 1}]))
    with pytest.raises(DamagedError, match=f"{SLOTS}.*no slots"):
        go_on(stopped.parent, stopped / "step-00000003")


def test_migration_by_lightning_imports_nothing_that_a_file_names(stopped, evil):
    path = stopped / "step-00000003"
    training = read_tensors(path / "training.pt")
    training |= {
        "pytorch-lightning_version": "0.9.0",
        "hparams_name": "evil_module.attribute",
        "hparams_type": "evil_module.attribute",
        "hyper_parameters": {"_class_path": "evil_module.attribute"},
        "checkpoint_callback_best_model_path": "evil_module",
        "callbacks": {**training["callbacks"], "evil_module.attribute": {"x": 1}},
    }
    write_tensors(path / "training.pt", training)
    forge(path, "training.pt", (path / "training.pt").read_bytes())
    with contextlib.suppress(ValueError, KeyError, RuntimeError):  # it may be refused
        go_on(stopped.parent, path)


def test_damage_is_found_by_the_checksums_alone_before_anything_is_unpickled(stopped, monkeypatch):
    flip(0.5)(stopped / "step-00000003" / "training.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(DamagedError, match="checksum does not match"):
        go_on(stopped.parent, stopped / "step-00000003")


def test_resumed_with_other_versions_of_libraries_says_which(stopped):
    path = stopped / "step-00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["versions"] |= {"torch": "1.0", "numpy": "0.9"}
    seal(path, manifest)
    with pytest.warns(UserWarning, match=r"other versions: .*torch 1\.0 then.*numpy 0\.9 then"):
        go_on(stopped.parent, path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"gradient_clip_val": 2.0}, "trainer.gradient_clip_val is 1.0 there and 2.0 here"),
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches is 1 there and 2 here"),
        ({"precision": "bf16-mixed"}, "trainer.precision is '32-true' there and 'bf16-mixed' here"),
    ],
)
def test_changed_settings_of_the_trainer_are_warned_of(stopped, changed, says):
    settings = {"gradient_clip_val": 1.0, **changed}
    trainer = Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=stopped.parent,
        callbacks=[Checkpoints()],
        **settings,
    )
    with pytest.warns(UserWarning, match=f"{says}: from here on the run is not what it would have been"):
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=stopped / "step-00000003")


class Other(TruncatedBPTT):
    """Another estimator."""


def test_changed_settings_of_the_module_are_refused_by_name(stopped):
    with pytest.raises(ValueError, match=r"model\.learning_rate is 0\.003 there and 0\.01 here"):
        fit(stopped.parent, STEPS, stopped / "last", module=make_module(learning_rate=0.01))
    module = make_module()
    module.estimator = Other(second_order=True)
    with pytest.raises(
        ValueError, match=r"model\.estimator\.class is 'TruncatedBPTT' there and 'Other' here"
    ):
        fit(stopped.parent, STEPS, stopped / "last", module=module)
    module.estimator = TruncatedBPTT(second_order=True, meta_loss=LogLoss())
    with pytest.raises(ValueError, match=r"meta_loss\.class is 'SumLoss' there and 'LogLoss' here"):
        fit(stopped.parent, STEPS, stopped / "last", module=module)
    with pytest.raises(ValueError, match=r"model\.final_fraction is 0\.03 there and 0\.5 here"):
        fit(stopped.parent, STEPS, stopped / "last", module=make_module(final_fraction=0.5))
    with pytest.raises(ValueError, match=r"data\.slots is 6 there and 8 here.*or start a new run"):
        fit(stopped.parent, STEPS, stopped / "last", data=make_data(slots=8))


@pytest.mark.slow
def test_another_number_of_actors_goes_on_bit_for_bit(straight, stopped):
    for actors in (1, 2):
        folder = stopped.parents[1] / f"actors-{actors}"
        shutil.copytree(stopped, folder / "checkpoints", symlinks=True)
        data = make_data(pool=PoolSettings(num_actors=actors))
        fit(folder, STEPS, folder / "checkpoints" / "last", callbacks=[Config()], data=data)
        end = f"checkpoints/step-{STEPS:08d}"
        assert differences(straight / end, folder / end) == []
