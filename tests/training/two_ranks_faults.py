"""What happens to one of two ranks ends all of them, with the same words; none is left waiting.

Run by test_two_ranks.py in a process of its own, as two_ranks.py is.
"""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from two_ranks import SLOTS, keep_all, stopped, train

from l2l_scale.training import Trainer
from l2l_scale.training.checkpoints import DamagedError, folder, shelf

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class OnRank(Callback):
    """Lets one rank fail from a meta-step on."""

    def __init__(self, rank, step, break_something):
        self.rank, self.step, self.break_something = rank, step, break_something

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            self.break_something()


def raising(error):
    def function(*_, **__):
        raise error

    return function


def full_disk():
    folder._Hashed.write = raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def strange_error():
    folder.write_tensors = raising(KeyError("strange"))


def no_link():
    Path.symlink_to = raising(OSError(errno.EROFS, os.strerror(errno.EROFS)))


WRITING = {
    "full disk": (full_disk, "cannot write the checkpoint .*00003: No space left .*; .* is .*00002"),
    "another error": (strange_error, "cannot write the checkpoint .*00003: KeyError.*; .* is .*00002"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", WRITING)
def test_where_one_rank_cannot_write_all_end_with_the_same_error(tmp_path, fault, rank):
    break_something, says = WRITING[fault]
    assert_all_end(tmp_path, [OnRank(rank, 3, break_something)], says)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-00000002"


def test_where_rank_0_cannot_set_the_link_all_end_with_the_same_error(tmp_path):
    says = r"00003 is written, but the link last .*: Read-only file system \(on rank 0\)"
    assert_all_end(tmp_path, [OnRank(0, 3, no_link)], says)


class Witnessed(Trainer):
    """Notes with which error each rank ended, and waits for the other to do so."""

    def _run(self, *args, **kwargs):
        try:
            return super()._run(*args, **kwargs)
        except Exception as error:
            where = Path(self.default_root_dir)
            (where / f"rank-{self.global_rank}").write_text(f"{type(error).__name__}: {error}")
            until = time.monotonic() + 30
            while not (where / f"rank-{1 - self.global_rank}").exists() and time.monotonic() < until:
                time.sleep(0.02)
            raise


def assert_all_end(where, callbacks, says, ckpt_path=None):
    """Both ranks raise the same error."""
    where.mkdir(exist_ok=True)
    with pytest.raises(Exception, match=says):
        train(where, 8, callbacks=[*callbacks, keep_all(where)], ckpt_path=ckpt_path, kind=Witnessed)
    first, second = ((where / f"rank-{rank}").read_text() for rank in (0, 1))
    assert first == second


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_rank_cannot_read_all_end_with_the_same_error_or_take_an_older_one(
    tmp_path, rank, monkeypatch
):
    train(tmp_path, 4, callbacks=[keep_all(tmp_path)])
    straight, _ = train(tmp_path / "straight", 8)
    damaged = tmp_path / "checkpoints" / "step-00000003"
    for path in shelf.checkpoints_in(tmp_path / "checkpoints")[3:]:
        shutil.rmtree(path)
    read = folder.read_tensors

    def read_on_one_rank(path, mapped=False):
        if path.parent == damaged and dist.get_rank() == rank:
            raise DamagedError(f"{path} cannot be read (Input/output error)")
        return read(path, mapped)

    monkeypatch.setattr(folder, "read_tensors", read_on_one_rank)
    says = rf"00003/training.pt cannot be read \(Input/output error\) \(on rank {rank}\)"
    assert_all_end(tmp_path, [], says, ckpt_path=damaged)
    resumed, _ = train(tmp_path, 8, ckpt_path=tmp_path / "checkpoints" / "last", init=1)
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize("name", ["manifest.json", SLOTS[1]])
def test_damaged_file_of_any_rank_is_named_and_two_ranks_go_on_from_the_checkpoint_before(tmp_path, name):
    straight, again = tmp_path / "straight", tmp_path / "again"
    phi, _ = train(straight, 6, callbacks=[keep_all(straight)])
    last = stopped(straight, again, 4)
    file = again / "checkpoints" / "step-00000004" / name
    file.write_bytes(file.read_bytes()[:-7])
    assert_all_end(again, [], rf"00004.*{name}", ckpt_path=file.parent)
    resumed, _ = train(again, 6, callbacks=[keep_all(again)], ckpt_path=last, init=1)
    assert torch.equal(phi, resumed)
