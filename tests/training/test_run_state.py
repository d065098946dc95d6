"""run.json: what a run says of itself while it trains, when it ends, and when it is resumed."""

import itertools
import json
import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_meta_training import Stop, fit

from l2l_scale import run_record
from l2l_scale.files import write_atomically
from l2l_scale.run_record import RUN_FILE, is_alive, read_record
from l2l_scale.training import run_state
from l2l_scale.training.run_state import RunStateFile, write_record

MONITOR = "valid/sum"


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


class Raises(Callback):
    """Fails after some meta-steps."""

    def __init__(self, after, error):
        self.after, self.error = after, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.after:
            raise self.error


class Values(Callback):
    """Logs a metric with these values, validation after validation."""

    def __init__(self, values):
        self.values = iter(values)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("value", next(self.values))


class Seen(Callback):
    """Keeps the file as it is after every meta-step."""

    def __init__(self, folder):
        self.folder, self.records = folder, []

    def on_train_batch_end(self, trainer, *_):
        self.records.append(read_record(self.folder))


def train(folder, max_steps=8, callbacks=(), mode="min", monitor=MONITOR, **kwargs):
    """Train with the callback, after others whose work it is to see."""
    state = RunStateFile(folder, monitor, mode)
    fit(folder, max_steps, callbacks=[*callbacks, state], **kwargs)
    return state


def test_says_who_runs_and_how_far_it_is(tmp_path):
    state = train(tmp_path, 8)
    record = read_record(tmp_path)
    assert (record["state"], record["meta_step"], record["max_steps"], record["starts"]) == (
        "running",
        8,
        8,
        1,
    )
    assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
    assert record["process_started"] == psutil.Process().create_time()
    assert (record["name"], record["slurm_job"], record["log"]) == (tmp_path.name, None, None)
    assert record["best"]["monitor"] == MONITOR
    assert record["best"]["meta_step"] in (4, 8)
    state.end("finished")
    assert read_record(tmp_path)["state"] == "finished"
    assert [path.name for path in tmp_path.iterdir()] == [RUN_FILE]


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", [3.0, 2.0, 5.0], (2.0, 8)),
        ("max", [3.0, 2.0, 5.0], (5.0, 12)),
        ("min", [3.0, 3.0, 3.0], (3.0, 4)),
        ("min", [float("nan"), float("inf"), 7.0], (7.0, 12)),
    ],
)
def test_keeps_the_best_validation(tmp_path, mode, values, best):
    train(tmp_path, 12, [Values(values)], mode=mode, monitor="value")
    record = read_record(tmp_path)
    assert (record["best"]["value"], record["best"]["meta_step"]) == best
    assert "NaN" not in (tmp_path / RUN_FILE).read_text()


def test_without_a_number_there_is_no_best(tmp_path):
    train(tmp_path, 4, [Values([float("nan")])], monitor="value")
    assert read_record(tmp_path)["best"] is None
    train(tmp_path, 4, monitor=None)
    assert read_record(tmp_path)["best"] is None


@pytest.mark.parametrize(("heartbeat", "steps"), [(0.0, [0, 1, 2, 3]), (1e9, [0, 0, 0, 0])])
def test_writes_between_validations_only_as_often_as_wished(tmp_path, monkeypatch, heartbeat, steps):
    monkeypatch.setattr(run_state, "HEARTBEAT", heartbeat)
    seen = Seen(tmp_path)
    train(tmp_path, 4, [seen])
    assert [record["meta_step"] for record in seen.records] == steps  # seen before the callback's turn


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (RuntimeError("no\nmemory"), "failed", "no memory"),
        (ValueError(), "failed", "ValueError"),
        (KeyboardInterrupt(), "stopped", "Ctrl-C"),
    ],
)
def test_what_ended_the_run_is_noted(tmp_path, error, state, message):
    expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
    with pytest.raises(expected):
        train(tmp_path, 8, [Raises(3, error)])
    record = read_record(tmp_path)
    assert (record["state"], record["message"], record["meta_step"]) == (state, message, 3)


def test_what_fails_after_training_is_noted_but_not_instead_of_what_was_said(tmp_path):
    state = train(tmp_path, 4)
    with pytest.raises(OSError, match="full"), state:
        raise OSError("disk full")
    assert read_record(tmp_path)["message"] == "disk full"
    state = train(tmp_path, 4)
    state.end("requeued", "SIGUSR1")
    with pytest.raises(SystemExit), state:
        raise SystemExit(1)
    assert (read_record(tmp_path)["state"], read_record(tmp_path)["message"]) == ("requeued", "SIGUSR1")


def test_a_run_that_never_started_writes_nothing(tmp_path):
    state = RunStateFile(tmp_path, MONITOR)
    with pytest.raises(RuntimeError), state:
        raise RuntimeError
    state.end("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("best_at", "kept"), [(4, True), (6, True), (8, False)])
def test_a_resumed_run_counts_and_keeps_the_best_that_lies_before(tmp_path, best_at, kept, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(100.0).__next__)  # a second for every look
    monkeypatch.setattr("l2l_scale.training.run_state.time", clock)
    train(tmp_path, 8, [Stop(6, tmp_path / "six.ckpt")])
    record = read_record(tmp_path)
    record["best"] = {"monitor": MONITOR, "value": -1.0, "meta_step": best_at}
    record["started"] = "2026-01-01T00:00:00+00:00"
    first = record["seconds"]
    assert 6 < first < 100
    record["seconds"] = 5000.0
    write_record(tmp_path, record, durable=False)
    train(tmp_path, 8, ckpt_path=tmp_path / "six.ckpt")
    record = read_record(tmp_path)
    assert 5002 <= record["seconds"] < 5000 + first
    assert (record["starts"], record["started"]) == (2, "2026-01-01T00:00:00+00:00")
    assert (record["best"]["value"] == -1.0) == kept


def test_a_best_of_another_metric_is_no_best(tmp_path):
    train(tmp_path, 4)
    state = RunStateFile(tmp_path, "valid/final")
    assert state._still_best(read_record(tmp_path)["best"], 100) is None


def test_a_damaged_file_of_an_earlier_start_is_replaced(tmp_path):
    (tmp_path / RUN_FILE).write_text("{")
    train(tmp_path, 4)
    assert read_record(tmp_path)["starts"] == 1


def test_a_file_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, capsys):
    (tmp_path / "run" / RUN_FILE / "in the way").mkdir(parents=True)
    state = train(tmp_path / "run", 8)
    state.end("finished")
    assert state.record["meta_step"] == 8
    assert capsys.readouterr().out.count("run.json cannot be written") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_FILE]


def test_the_training_is_the_same_with_it(tmp_path):
    state = RunStateFile(tmp_path, MONITOR)
    modules = [fit(tmp_path, 8, callbacks=callbacks)[0] for callbacks in ([state], [])]
    for a, b in zip(*(module.rule.parameters() for module in modules), strict=True):
        assert torch.equal(a, b)


def test_only_rank_0_writes(tmp_path):
    class Other:
        is_global_zero, sanity_checking, global_step = False, False, 3

    state = RunStateFile(tmp_path, MONITOR)
    state.on_train_start(Other(), None)
    state.on_train_batch_end(Other(), None, None, None, 0)
    state.on_validation_end(Other(), None)
    state.on_exception(Other(), None, RuntimeError("x"))
    state.end("failed", "x")
    assert list(tmp_path.iterdir()) == []


def test_job_and_log_as_slurm_names_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    train(tmp_path, 4)
    assert (read_record(tmp_path)["slurm_job"], read_record(tmp_path)["log"]) == ("7", None)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$3" = 7 ] && echo "   StdErr=/x" && echo "   StdOut=/a b/7.out"\n')
    scontrol.chmod(0o755)
    train(tmp_path, 4)
    assert (read_record(tmp_path)["slurm_job"], read_record(tmp_path)["log"]) == ("7", "/a b/7.out")


def test_a_pid_that_is_used_again_is_not_the_run():
    started = psutil.Process().create_time()
    assert is_alive(os.getpid(), started)
    assert not is_alive(os.getpid(), started - 3600)
    assert not any(is_alive(pid, started) for pid in (-1, 2**22 + 1, 2**80))


@pytest.mark.parametrize(
    "change",
    [
        {"state": "sleeping"},
        {"pid": "7"},
        {"best": {"value": 1}},
        {"best": {"monitor": "x", "value": None, "meta_step": 1}},
        {"updated": "yesterday"},
        {"updated": "2026-01-01T00:00:00"},
        {"message": 3},
        {"seconds": "long"},
    ],
)
def test_damage_is_noticed(tmp_path, change):
    record = {**EXAMPLE, **change}
    (tmp_path / RUN_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"."):
        read_record(tmp_path)


EXAMPLE = {
    **{"state": "running", "message": None, "name": "a", "host": "h", "pid": 7, "process_started": 1.0},
    **{"slurm_job": None, "started": run_record.now(), "updated": run_record.now(), "starts": 1, "log": None},
    **{"seconds": 3.5, "meta_step": 1, "max_steps": 2, "monitor": MONITOR, "mode": "min", "best": None},
}


def test_of_an_older_record_the_time_between_start_and_last_word_is_taken(tmp_path):
    record = {**EXAMPLE, "started": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:01:30+00:00"}
    del record["seconds"]
    (tmp_path / RUN_FILE).write_text(json.dumps(record))
    assert read_record(tmp_path)["seconds"] == 90


def test_undamaged_and_newer_records_are_read(tmp_path):
    for record in (EXAMPLE, {**EXAMPLE, "something": "new"}):
        (tmp_path / RUN_FILE).write_text(json.dumps(record))
        assert read_record(tmp_path) == record
    for text in ("", "{", "[]", "null", json.dumps({"state": "running"}), "\x00"):
        (tmp_path / RUN_FILE).write_text(text)
        with pytest.raises(ValueError, match=r"."):
            read_record(tmp_path)


def test_atomic_write_makes_folders_and_leaves_the_old_file_if_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    write_atomically(path, b"old", durable=False)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert [(one.name, one.read_bytes()) for one in path.parent.iterdir()] == [("b.json", b"old")]
