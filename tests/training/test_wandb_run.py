"""The logger by itself; how a user meets it is tested with the command line."""

import pytest
import torch
import wandb
from wandb_records import new_client, pieces, records

from l2l_scale.training import WandbRun


@pytest.fixture(autouse=True)
def _new_client():
    new_client()
    yield
    new_client()


def test_logs_numbers_pictures_tables_and_files(tmp_path):
    run = WandbRun(save_dir=str(tmp_path))
    run.log_hyperparams({"a": {"b": [1, None]}})
    run.log_metrics({"x": 0.5}, step=3)
    run.log_image("picture", [torch.zeros(3, 4, 4)], step=4)
    run.log_table("table", columns=["a"], data=[[1.5]], step=4)
    (tmp_path / "file.txt").write_text("text")
    run.log_files("notes", [tmp_path / "file.txt"], {"n": 1})
    run.finish()
    (piece,) = pieces(tmp_path)
    assert piece.config["a"] == {"b": [1, None]}
    assert piece.history[0]["x"] == 0.5
    assert [row["trainer/global_step"] for row in piece.history] == [3, 4, 4]
    assert piece.history[1]["picture/count"] == 1
    assert piece.history[2]["table/ncols"] == 1
    assert piece.artifacts["notes"].name == f"notes-{piece.id}"
    assert piece.exit_codes == [0]


def test_a_log_that_is_still_being_written_is_read_up_to_the_cut(tmp_path):
    run = WandbRun(save_dir=str(tmp_path))
    run.log_metrics({"x": 0.5})
    run.finish()
    (piece,) = pieces(tmp_path)
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written, cut = log.read_bytes(), tmp_path / "cut"
    for length in range(7, len(written), 5):
        cut.write_bytes(written[:length])
        found = list(records(cut))
        assert found == piece.records[: len(found)]


def test_the_id_is_kept_in_the_folder_and_used_again(tmp_path):
    for value in (1.0, 2.0):
        run = WandbRun(save_dir=str(tmp_path))
        run.log_metrics({"x": value})
        run.finish()
    first, second = pieces(tmp_path)
    assert first.id == second.id == (tmp_path / "wandb" / "run_id").read_text().strip()
    assert second.runs[0].display_name == tmp_path.name


def test_a_run_that_will_go_on_is_no_failure(tmp_path):
    run = WandbRun(save_dir=str(tmp_path))
    run.log_metrics({"x": 1.0})
    run.mark_preempted()
    run.finalize("failed")
    (piece,) = pieces(tmp_path)
    assert piece.preempted
    assert piece.exit_codes == [1]  # which W&B shows as "preempted"


def test_waits_until_it_begins(tmp_path):
    run = WandbRun(save_dir=str(tmp_path))
    run.wait()
    run.experiment.anything("does nothing")
    run.log_metrics({"x": 1.0})
    assert not (tmp_path / "wandb").exists()
    run.begin()
    run.log_metrics({"x": 2.0})
    run.finish()
    run.log_metrics({"x": 3.0})
    (piece,) = pieces(tmp_path)
    assert [row["x"] for row in piece.history] == [2.0]


def test_a_failure_to_log_is_said_once_and_goes_no_further(tmp_path, capsys, monkeypatch):
    run = WandbRun(save_dir=str(tmp_path))
    run.log_metrics({"x": 1.0})

    def fail(*_, **__):
        raise BrokenPipeError("the client is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run.experiment, "log", fail)
        for _ in range(3):
            run.log_metrics({"x": 2.0})
    run.log_hyperparams({"a": 1})  # other things go on
    run.finish()
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert said == ["W&B: log_metrics failed, and is not tried again in this run (the client is gone)"]
    (piece,) = pieces(tmp_path)
    assert piece.config["a"] == 1


def test_a_client_that_cannot_start_is_said_and_nothing_is_logged(tmp_path, capsys, monkeypatch):
    def fail(**_):
        raise OSError("no space left\non the device")

    monkeypatch.setattr(wandb, "init", fail)
    run = WandbRun(save_dir=str(tmp_path))
    run.log_metrics({"x": 1.0})
    run.log_files("notes", [tmp_path / "none"])
    run.finish()
    assert capsys.readouterr().out == "W&B: nothing is logged (no space left on the device)\n"


def test_an_end_that_fails_is_said(tmp_path, capsys, monkeypatch):
    run = WandbRun(save_dir=str(tmp_path))
    finish = run.experiment.finish

    def fail(**_):
        finish()
        raise ConnectionResetError

    monkeypatch.setattr(run.experiment, "finish", fail)
    run.finish()
    assert "the end of the run was not recorded (ConnectionResetError); to upload" in capsys.readouterr().out


def test_places_of_files_that_the_user_chose_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "mine"))
    (tmp_path / "file.txt").write_text("text")
    run = WandbRun(save_dir=str(tmp_path / "run"))
    run.log_files("notes", [tmp_path / "file.txt"])
    run.finish()
    assert list((tmp_path / "mine").rglob("staging/*"))
    assert not (tmp_path / "run" / "wandb" / "artifacts").exists()


@pytest.mark.parametrize("name", ["init_timeout", "finish_timeout"])
def test_timeouts_are_above_zero(name):
    with pytest.raises(ValueError, match=rf"{name} \(0\) must be a finite number > 0"):
        WandbRun(**{name: 0})
