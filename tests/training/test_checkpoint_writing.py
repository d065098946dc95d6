"""Writing that fails or is cut short: the last whole checkpoint stays, and what happened is said."""

import errno
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_checkpoints import differences, fit

from l2l_scale.training import Checkpoints
from l2l_scale.training.checkpoints import CheckpointError, folder, shelf
from l2l_scale.training.checkpoints.inflight import KEY
from l2l_scale.training.checkpoints.store import save_together

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = 6


class At(Callback):
    """Does something after a meta-step, before the checkpoint of it is written."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    path = tmp_path_factory.mktemp("straight")
    fit(path, STEPS)
    return path / "checkpoints" / f"step-{STEPS:08d}"


def assert_last_is(checkpoints, step, straight):
    """Nothing is left of the checkpoint that failed, and the run can go on from the one before."""
    assert not list(checkpoints.glob(".step-*"))
    assert [path.name for path in whole_ones(checkpoints)][-1] == f"step-{step:08d}"
    assert (checkpoints / "last").resolve().name == f"step-{step:08d}"
    fit(checkpoints.parent, STEPS, checkpoints / "last")
    assert differences(straight, checkpoints / f"step-{STEPS:08d}") == []


@contextmanager
def mounted(path, options):
    """A small file system in memory; the test is skipped where that is not allowed."""
    path.mkdir()
    if shutil.which("mount") is None or sys.platform != "linux":
        pytest.skip("needs mount")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path):
    """Leave no more than a few kilobytes."""
    disk = os.statvfs(path.parent)
    path.write_bytes(bytes(disk.f_bavail * disk.f_frsize - 8192))


def test_full_disk_ends_the_run_with_one_message_and_costs_no_checkpoint(tmp_path, straight, capfd):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(CheckpointError) as raised:
            fit(disk, STEPS, callbacks=[At(4, lambda: fill(disk / "ballast"))])
        checkpoints = disk / "checkpoints"
        assert str(raised.value) == (
            f"cannot write the checkpoint {checkpoints / 'step-00000004'}: No space left on device; "
            f"the last whole checkpoint is {checkpoints / 'step-00000003'}"
        )
        assert "Pytorch" not in capfd.readouterr().err  # torch's writer complains of its own
        (disk / "ballast").unlink()
        assert_last_is(checkpoints, 3, straight)


def test_file_system_that_became_read_only(tmp_path, straight):
    with mounted(tmp_path / "disk", "size=1m") as disk:

        def remount(how):
            subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

        with pytest.raises(CheckpointError, match=r"step-00000004: Read-only file system; .*step-00000003$"):
            fit(disk, STEPS, callbacks=[At(4, lambda: remount("ro"))])
        remount("rw")
        assert_last_is(disk / "checkpoints", 3, straight)


def raising(number):
    def function(*_, **__):
        raise OSError(number, os.strerror(number))

    return function


def after(count, function, error):
    """A function that works so many times, and then fails."""
    calls = iter(range(count))

    def wrapped(*args, **kwargs):
        if next(calls, None) is None:
            raise OSError(error, os.strerror(error))
        return function(*args, **kwargs)

    return wrapped


FAULTS = {
    "no draft": (Path, "mkdir", 0, errno.EROFS),
    "no byte": (folder._Hashed, "write", 0, errno.ENOSPC),
    "some bytes": (folder._Hashed, "write", 20, errno.ENOSPC),
    "flushing": (os, "fsync", 0, errno.EIO),
    "flushing the second": (os, "fsync", 1, errno.EDQUOT),
    "flushing the manifest": (os, "fsync", 2, errno.ENOSPC),
    "flushing the folder": (os, "fsync", 3, errno.EIO),
    "the manifest": (Path, "replace", 0, errno.ENOSPC),
    "its place": (Path, "rename", 0, errno.EROFS),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_any_fault_in_writing_leaves_the_checkpoint_before(tmp_path, straight, monkeypatch, fault):
    where, name, count, error = FAULTS[fault]
    faulty = At(4, lambda: monkeypatch.setattr(where, name, after(count, getattr(where, name), error)))
    says = f"cannot write the checkpoint .*step-00000004: {os.strerror(error)}; .* is .*step-00000003$"
    with pytest.raises(CheckpointError, match=says):
        fit(tmp_path, STEPS, callbacks=[faulty])
    monkeypatch.undo()
    assert_last_is(tmp_path / "checkpoints", 3, straight)


@pytest.mark.parametrize(("where", "name"), [(Path, "symlink_to"), (shelf, "discard")])
def test_fault_after_writing_names_the_checkpoint_that_is_whole(tmp_path, straight, monkeypatch, where, name):
    faulty = At(4, lambda: monkeypatch.setattr(where, name, raising(errno.ENOSPC)))
    says = "step-00000004 is written, but .*: No space left on device"
    with pytest.raises(CheckpointError, match=says):
        fit(tmp_path, STEPS, callbacks=[faulty], keep_last=2)
    monkeypatch.undo()
    fit(tmp_path, STEPS, tmp_path / "checkpoints" / "last")
    assert differences(straight, tmp_path / "checkpoints" / straight.name) == []


def test_where_one_of_the_same_name_cannot_be_replaced_it_stays(tmp_path, monkeypatch):
    write(tmp_path / "step-00000001", value=1.0)
    rename = Path.rename

    def fail_for_the_new_one(self, target):
        if "draft" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(CheckpointError, match=r"Input/output error; the last whole .* is .*step-00000001$"):
        write(tmp_path / "step-00000001", value=2.0)
    monkeypatch.undo()
    assert value_of(tmp_path / "step-00000001") == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"cannot write .*00001: Not a directory; there is no earlier checkpoint"
    ):
        fit(tmp_path, STEPS)
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_file_in_place_of_a_checkpoint(tmp_path, straight):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000004").write_text("mine")
    with pytest.raises(CheckpointError, match=r"step-00000004: Not a directory; .* is .*step-00000003"):
        fit(tmp_path, STEPS)
    assert (tmp_path / "checkpoints" / "step-00000004").read_text() == "mine"
    (tmp_path / "checkpoints" / "step-00000004").unlink()
    assert_last_is(tmp_path / "checkpoints", 3, straight)


# ------------------------------------------------------------------------------------------- sudden deaths


def write(path, value=0.0):
    content = {
        "global_step": int(path.name[-8:]),
        "state_dict": {"phi": torch.full((100,), value)},
        KEY: {"next_window": 1, "slots": [{"": {"first": 0, "leaves": [torch.zeros(4, 3)]}}]},
    }
    save_together(content, path, {"config.yaml": "a: 1\n"})


def value_of(path):
    return float(folder.read_tensors(path / folder.TRAINING)["state_dict"]["phi"][0])


def save(where, step, keep_last, value=0.0):
    """What the callback does at a meta-step."""
    trainer = SimpleNamespace(
        global_step=step, is_global_zero=True, save_checkpoint=lambda path: write(path, value)
    )
    Checkpoints(dirpath=str(where), keep_last=keep_last, heed_signals=False).save(trainer)


def verify(path):
    manifest = folder.read_manifest(path)
    for name in manifest["files"]:
        folder.check_file(path, name, manifest)
    return manifest


def whole_ones(where):
    paths = shelf.checkpoints_in(where)
    for path in paths:
        verify(path)
    return paths


def dies(where, action, event):
    """Run something in a fork that ends, without any cleaning up, before its nth event; whether it did.

    Events are what touches the folder: opening to write, writing, flushing, renaming, deleting, linking.
    """
    child = os.fork()
    if child == 0:
        count = writes = 0

        def tick(name, args):
            nonlocal count, writes
            writes += name == "write"
            if name == "write" and writes % 16 != 1:  # torch writes in many small pieces
                return
            kinds = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "write", "flush")
            opens = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if name in kinds or opens:
                count += 1
                if count == event:
                    os._exit(7)

        def before(name, function):
            def wrapped(*args):
                tick(name, args)
                return function(*args)

            return wrapped

        folder._Hashed.write = before("write", folder._Hashed.write)
        os.fsync = before("flush", os.fsync)
        sys.addaudithook(tick)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 7)
    return code == 7


SCENES = {
    "the first": ([], 1, 2),
    "keeping two": ([1, 2], 3, 2),
    "keeping one": ([1], 2, 1),
    "replacing the last": ([1, 2], 2, 2),
    "replacing the only one": ([1], 1, 1),
}


@pytest.mark.parametrize("scene", SCENES)
def test_death_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path, scene):
    earlier, step, keep_last = SCENES[scene]
    for one in earlier:
        save(tmp_path / "before", one, keep_last, value=float(one))
    event = 0
    while True:
        event, where = event + 1, tmp_path / f"{event}"
        if earlier:
            shutil.copytree(tmp_path / "before", where, symlinks=True)
        died = dies(where, lambda where=where: save(where, step, keep_last, value=99.0), event)
        assert_recovers(where, earlier, died, step, keep_last)
        if not died:
            break
    assert event > 15


def assert_recovers(where, earlier, died, step, keep_last):
    assert shelf.has_checkpoint(where) or not earlier
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that looks like a checkpoint is damaged
        if earlier or not died:
            path, manifest = shelf.last_whole(where, verify)
            assert value_of(path) in ([99.0, float(earlier[-1])] if died else [99.0])
            assert manifest["meta_step"] >= (earlier or [step])[-1]
    if where.is_dir():
        expected = [value_of(path) for path in shelf.candidates(where)]
        folder.tidy(where)  # the next run
        assert not list(where.glob(".*"))
        assert [value_of(path) for path in shelf.candidates(where)] == expected
        assert all(path in whole_ones(where) for path in where.glob("step-*"))
    save(where, 9, keep_last)
    assert whole_ones(where)[-1].name == (where / "last").resolve().name == "step-00000009"
    assert (
        len(whole_ones(where)) == min(keep_last, len({*earlier[:1], 9}))
        or len(whole_ones(where)) <= keep_last
    )
    assert not list(where.glob(".*"))


def test_death_at_any_moment_of_tidying_leaves_a_whole_checkpoint(tmp_path):
    def leave(where):
        save(where, 1, 9, value=1.0)
        save(where, 2, 9, value=2.0)
        shutil.copytree(where / "step-00000001", where / ".step-00000001.old")
        shutil.copytree(where / "step-00000001", where / ".step-00000003.draft")
        (where / "step-00000002").rename(where / ".step-00000002.old")
        (where / ".last.draft").symlink_to("step-00000002")

    event, died = 0, True
    while died:
        event, where = event + 1, tmp_path / f"{event}"
        leave(where)
        died = dies(where, lambda where=where: folder.tidy(where), event)
        assert value_of(shelf.last_whole(where, verify)[0]) == 2.0
        folder.tidy(where)
        assert [value_of(path) for path in whole_ones(where)] == [1.0, 2.0]
        assert not list(where.glob(".*"))
    assert event > 5


def test_death_at_any_moment_of_deleting(tmp_path):
    event, died = 0, True
    while died:
        event, where = event + 1, tmp_path / f"{event}"
        save(where, 1, 9)
        save(where, 2, 9)
        died = dies(where, lambda where=where: folder.discard(where / "step-00000001"), event)
        assert whole_ones(where) == sorted(where.glob("step-*"))
        folder.tidy(where)
        assert not list(where.glob(".*"))
    assert event > 4
