"""Logging to Weights & Biases as a user meets it. There is no network: a stand-in, or nobody, answers."""

import csv
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from wandb_records import new_client, pieces, read
from wandb_server import KEY, WandbServer

from l2l_scale.cli.main import main

ROOT = Path(__file__).parents[2]
SMOKE = ["-c", str(ROOT / "configs" / "smoke.yaml")]
OVERLAY = ["-c", str(ROOT / "configs" / "overlays" / "wandb.yaml")]
PLAIN = ["--trainer.logger=WandbRun"]
"""Without the picture at validations."""
QUIET = ["--trainer.enable_progress_bar=false"]
EVALUATION = ["--evaluation.num_tasks=16", "--evaluation.num_tuning_tasks=8", "--evaluation.baselines=[SGD]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder without anything in it, and no settings of W&B in the environment."""
    folder = tmp_path_factory.mktemp("home")
    new_client()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _new_client(home):
    yield
    new_client()


def command(*arguments):
    return [sys.executable, "-m", "l2l_scale", *arguments]


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A run without a key, started from a terminal, in which the client could ask for one; its output."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    terminal, end = pty.openpty()
    arguments = command("fit", *SMOKE, *OVERLAY, *QUIET, "--run_dir", str(folder))
    with subprocess.Popen(arguments, cwd=ROOT, stdin=end, stdout=end, stderr=end) as process:
        os.close(end)
        said = b""
        while block := _read(terminal):
            said += block
    os.close(terminal)
    assert process.returncode == 0, said.decode()
    return folder, said.decode().replace("\r\n", "\n")


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def said_by_wandb(text):
    return [line for line in text.splitlines() if line.lower().startswith(("w&b", "wandb"))]


def test_without_a_key_the_run_is_offline_which_is_said_once_with_what_uploads_it(run):
    folder, said = run
    (line,) = said_by_wandb(said)
    assert "offline (there is no API key" in line
    (piece,) = (folder / "wandb").glob("offline-run-*")
    assert line.endswith(f"wandb sync {piece}")


def test_nothing_is_written_to_the_home_folder(run, home):
    assert [path for path in home.rglob("*") if "wandb" in path.name] == []


def test_config_of_the_run_is_the_resolved_one_with_code_and_versions(run, tmp_path, capsys):
    folder, _ = run
    (piece,) = pieces(folder)
    config = piece.config
    git, versions = config.pop("git"), config.pop("versions")
    assert config["model"]["rule"]["class_path"] == "l2l_scale.optimizers.CoordinatewiseLSTM"
    assert config["model"]["rule"]["init_args"]["output_scale"] == 0.1  # a default
    (tmp_path / "logged.json").write_text(json.dumps(config))  # JSON is YAML
    printed = [printed_config(path, capsys) for path in (tmp_path / "logged.json", folder / "config.yaml")]
    assert printed[0] == printed[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert git == {} if commit.returncode else git["commit"] == commit.stdout.strip()
    names = {"python", "torch", "lightning", "ray", "wandb", "numpy", "l2l_scale"}
    assert set(versions) == names
    assert versions["torch"] == version("torch")


def printed_config(path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(path), "--print_config"])
    return capsys.readouterr().out


def test_metrics_are_those_of_the_csv_file_over_meta_steps(run):
    folder, _ = run
    (piece,) = pieces(folder)
    assert "trainer/global_step" in piece.step_metric
    with (folder / "metrics.csv").open() as file:
        kept = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    logged = [row for row in piece.history if not any(key.startswith("valid/curves") for key in row)]
    expected = [{"trainer/global_step": row.pop("step"), **row} for row in kept]
    assert [{key: row[key] for key in row if not key.startswith("_")} for row in logged] == [
        pytest.approx(row) for row in expected
    ]


def test_picture_of_the_validation_and_the_rule_are_logged(run):
    folder, _ = run
    (piece,) = pieces(folder)
    (row,) = [row for row in piece.history if "valid/curves/filenames" in row]
    assert row["trainer/global_step"] == 25
    (media,) = row["valid/curves/filenames"]
    (picture,) = (folder / "wandb").glob(f"offline-run-*/files/{media}")
    assert picture.read_bytes() == (folder / "validation.png").read_bytes()
    rule = piece.artifacts["rule"]
    assert rule.name == f"rule-{piece.id}"
    assert json.loads(rule.metadata)["meta_steps"] == 50
    assert "Quadratic" in json.loads(rule.metadata)["family"]
    (entry,) = rule.manifest.contents
    assert entry.path == "rule.safetensors"
    assert Path(entry.local_path).read_bytes() == (folder / "rule.safetensors").read_bytes()


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run, to be changed."""
    source, _ = run
    shutil.copytree(source, tmp_path / "copy", symlinks=True)
    text = (source / "config.yaml").read_text()
    (tmp_path / "copy" / "config.yaml").write_text(text.replace(str(source), str(tmp_path / "copy")))
    return tmp_path / "copy"


def test_resumed_run_keeps_its_id_and_the_counts_of_meta_steps(copied):
    main(["fit", "-c", str(copied / "config.yaml"), "--ckpt_path=last", "--trainer.max_steps=75"])
    first, second = pieces(copied)
    assert first.id == second.id
    assert [row["trainer/global_step"] for row in second.history] == [60, 75]


def test_all_of_a_resumed_offline_run_can_be_uploaded_as_one(copied):
    main(["fit", "-c", str(copied / "config.yaml"), "--ckpt_path=last", "--trainer.max_steps=75"])
    first, _ = pieces(copied)
    with WandbServer() as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        for folder in sorted((copied / "wandb").glob("offline-run-*")):
            sync = [sys.executable, "-m", "wandb", "sync", str(folder)]
            subprocess.run(sync, env=environment, cwd=copied, capture_output=True, check=True, timeout=60)
    rows = server.history[first.id]
    assert [row["trainer/global_step"] for row in rows if "valid/sum" in row] == [25, 50, 75]
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_overwritten_run_has_a_new_id_and_leaves_nothing_of_the_old(copied):
    (old,) = pieces(copied)
    main(["fit", "-c", str(copied / "config.yaml"), "--overwrite=true", "--trainer.max_steps=25"])
    (new,) = pieces(copied)
    assert new.id != old.id


def test_refused_run_starts_none_at_wandb(copied, capsys):
    before = sorted((copied / "wandb").rglob("*"))
    for mistake in ("--data.slots=8", "--trainer.precision=16-mixed", "--trainer.max_steps=60"):
        with pytest.raises(SystemExit):
            main(["fit", "-c", str(copied / "config.yaml"), "--ckpt_path=last", mistake])
    assert sorted((copied / "wandb").rglob("*")) == before
    assert "W&B" not in capsys.readouterr().out


def test_failed_run_is_recorded_as_failed(tmp_path, capsys):
    bad = ["--model.learning_rate=1e30", "--model.divergence_patience=2", "--trainer.max_steps=1000"]
    with pytest.raises(SystemExit):
        main(["fit", *SMOKE, *PLAIN, *QUIET, *bad, "--run_dir", str(tmp_path)])
    (piece,) = pieces(tmp_path)
    assert piece.exit_codes == [1]


def test_evaluation_goes_into_the_same_run(copied):
    main(["evaluate", "-c", str(copied / "config.yaml"), *EVALUATION])
    fit, evaluation = pieces(copied)
    assert fit.id == evaluation.id
    rows = {key: row for row in evaluation.history for key in row}
    (picture,) = (copied / "wandb").glob(
        f"offline-run-*/files/{rows['evaluation/curves/filenames']['evaluation/curves/filenames'][0]}"
    )
    assert picture.read_bytes() == (copied / "evaluation" / "curves.png").read_bytes()
    assert all(row["trainer/global_step"] == 50 for row in evaluation.history)
    media = rows["evaluation/losses/path"]["evaluation/losses/path"]
    (path,) = (copied / "wandb").glob(f"offline-run-*/files/{media}")
    table = json.loads(path.read_text())
    report = json.loads((copied / "evaluation" / "report.json").read_text())["tests"]["held-out"]
    losses = {row[0]: row[table["columns"].index("mean @20")] for row in table["data"]}
    assert losses == {name: entry["mean"]["20"] for name, entry in report["optimizers"].items()}
    assert evaluation.artifacts["evaluation"].manifest.contents[0].path == "report.json"


def test_evaluation_without_the_overlay_is_as_before(run, tmp_path, capsys):
    rule = str(run[0] / "rule.safetensors")
    main(["evaluate", *SMOKE, "--rule", rule, "--out", str(tmp_path), *EVALUATION])
    assert "W&B" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "curves.png"}


def test_mode_disabled_logs_nothing_and_says_nothing(tmp_path, capsys):
    main(["fit", *SMOKE, *PLAIN, *QUIET, "--trainer.logger.mode=disabled", "--run_dir", str(tmp_path)])
    assert "W&B" not in capsys.readouterr().out
    assert (tmp_path / "metrics.csv").is_file()
    assert not (tmp_path / "wandb").exists()


def test_no_logger_at_all_on_request(tmp_path):
    main(["fit", *SMOKE, *QUIET, "--trainer.logger=false", "--run_dir", str(tmp_path)])
    written = {"config.yaml", "checkpoints", "rule.safetensors", "run.json", "log.txt", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_another_logger_is_beside_the_csv_file(tmp_path):
    other = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger"]
    other += [f"--trainer.logger.save_dir={tmp_path / 'more'}", "--trainer.logger.name=x"]
    main(["fit", *SMOKE, *QUIET, *other, "--run_dir", str(tmp_path / "run")])
    (second,) = (tmp_path / "more").rglob("metrics.csv")
    assert second.read_text() == (tmp_path / "run" / "metrics.csv").read_text()


@pytest.fixture
def closed_port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.slow
def test_server_that_does_not_answer_costs_the_init_timeout_and_the_run_is_offline(tmp_path, closed_port):
    environment = {**os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{closed_port}", "WANDB_API_KEY": KEY}
    logger = [*PLAIN, "--trainer.logger.init_timeout=2"]
    started = time.monotonic()
    done = subprocess.run(
        command("fit", *SMOKE, *logger, *QUIET, "--run_dir", str(tmp_path)),
        **{"capture_output": True, "text": True, "env": environment, "cwd": ROOT},
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    (line,) = said_by_wandb(done.stdout + done.stderr)
    assert "offline (" in line
    assert "wandb sync" in line
    (piece,) = pieces(tmp_path)
    assert [row["valid/sum"] for row in piece.history if "valid/sum" in row]


def test_key_that_cannot_be_one_gives_an_offline_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    main(["fit", *SMOKE, *PLAIN, *QUIET, "--run_dir", str(tmp_path)])
    assert "offline (WANDB_API_KEY invalid" in capsys.readouterr().out
    assert len(pieces(tmp_path)) == 1


def online(monkeypatch, server):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_online_run_is_resumed_and_evaluated_under_its_id(tmp_path, monkeypatch, capsys):
    with WandbServer() as server:
        online(monkeypatch, server)
        main(["fit", *SMOKE, *OVERLAY, *QUIET, "--run_dir", str(tmp_path)])
        config = str(tmp_path / "config.yaml")
        main(["fit", "-c", config, "--ckpt_path=last", "--trainer.max_steps=75"])
        main(["evaluate", "-c", config, *EVALUATION])
    first, *more = server.started
    assert more == [first, first]
    assert (tmp_path / "wandb" / "run_id").read_text().split() == [first]
    lines = said_by_wandb(capsys.readouterr().out)
    assert len(lines) == 3
    assert all(line.startswith(f"W&B: run {first} at {server.url}") for line in lines)
    steps = [row["trainer/global_step"] for row in server.history[first] if "valid/sum" in row]
    assert steps == [25, 50, 75]
    assert {"rule", "evaluation"} <= set(server.artifact_types)
    assert server.config["git"]
    assert server.config["model"]["value"]["rule"]["init_args"]["hidden_size"] == 8
    assert server.uploads["rule.safetensors"] == (tmp_path / "rule.safetensors").stat().st_size
    assert any(name.startswith("media/images/evaluation/curves") for name in server.uploads)


def test_server_that_goes_away_does_not_hold_up_the_end(tmp_path, monkeypatch, capsys):
    with WandbServer(dies_at_history=True) as server:
        online(monkeypatch, server)
        started = time.monotonic()
        logger = [*PLAIN, "--trainer.logger.finish_timeout=2"]
        main(["fit", *SMOKE, *logger, *QUIET, "--run_dir", str(tmp_path)])
        assert time.monotonic() - started < 30
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "wandb").glob("run-*")
    assert f"not everything was uploaded within 2 s; to upload it later: wandb sync {folder}" in said
    assert "best rule by valid/sum" in said
    assert [row["valid/sum"] for row in read(folder).history if "valid/sum" in row]


@pytest.mark.slow
def test_only_one_of_two_processes_logs(tmp_path):
    ddp = ["--data.slots=8", "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command("fit", *SMOKE, *OVERLAY, *QUIET, *ddp, "--run_dir", str(tmp_path)),
        **{"capture_output": True, "text": True, "env": environment, "cwd": ROOT, "timeout": 180},
    )
    assert done.returncode == 0, done.stderr
    assert len(said_by_wandb(done.stdout)) == 1
    (piece,) = pieces(tmp_path)
    rows = [row for row in piece.history if "valid/sum" in row]
    assert [row["trainer/global_step"] for row in rows] == [25, 50]
    assert (tmp_path / "validation.png").is_file()
