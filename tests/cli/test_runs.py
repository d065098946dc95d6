"""``l2l-scale runs``: real runs that finish, fail or are killed; and folders that others wrote or broke."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone

import pytest
from test_cli import SMOKE, fails

from l2l_scale.cli.main import main
from l2l_scale.cli.runs import ago
from l2l_scale.run_record import RUN_FILE, read_record

SMALL = ["--trainer.enable_progress_bar=false", "--trainer.max_steps=4", "--data.windows_per_epoch=2"]


def fit(folder, *options):
    main(["fit", "-c", SMOKE, "--run_dir", str(folder), *SMALL, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    fit(folder)
    return folder


@pytest.fixture
def make(finished, tmp_path):
    """Makes copies of the finished run, with another run.json: changes, text, or None for none at all."""

    def make_(name, change):
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        record = json.loads((folder / RUN_FILE).read_text())
        text = change if isinstance(change, str) else json.dumps({**record, **(change or {})})
        (folder / RUN_FILE).write_text(text)
        if change is None:
            (folder / RUN_FILE).unlink()
        return folder

    return make_


@pytest.fixture
def listed(capsys):
    """Calls the command and returns its JSON."""

    def listed_(*arguments):
        capsys.readouterr()
        main(["runs", "--json", *map(str, arguments)])
        return json.loads(capsys.readouterr().out)

    return listed_


@pytest.fixture
def shown(capsys):
    """Calls the command and returns what it prints."""

    def shown_(*arguments):
        capsys.readouterr()
        main(["runs", *map(str, arguments)])
        return capsys.readouterr().out

    return shown_


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """Puts a squeue into the path that answers with these lines, and counts its calls in a file."""
    folder = tmp_path_factory.mktemp("bin")

    def slurm_(*lines):
        text = "".join(f"echo '{line}'\n" for line in lines)
        (folder / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{text}')
        (folder / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        return folder / "calls"

    return slurm_


def ago_(**kwargs):
    return (datetime.now(timezone.utc) - timedelta(**kwargs)).isoformat(timespec="seconds")


def test_finished_run(finished, listed, shown):
    (run,) = listed(finished.parent)
    assert (run["name"], run["state"], run["meta_step"], run["max_steps"]) == ("smoke", "finished", 4, 4)
    assert (run["host"], run["folder"], run["resume"]) == (socket.gethostname(), str(finished), None)
    assert run["best"] == read_record(finished)["best"]
    text = shown(finished.parent)
    assert all(part in text for part in ("smoke", "finished", "4 / 4 (100%)", "valid/sum", "s ago"))
    assert f"{run['best']['value']:.4g} @ {run['best']['meta_step']}" in text
    assert "--ckpt_path" not in text
    assert "SLURM" not in text
    assert listed(finished) == [{**run, "name": str(finished)}]


def test_failed_run_says_why(tmp_path, capsys, shown, listed):
    lost = ["--model.rule.output_scale=1e30", "--model.divergence_patience=1"]
    fails(["fit", "-c", SMOKE, "--run_dir", str(tmp_path / "bad"), *SMALL, *lost], capsys, code=1)
    (run,) = listed(tmp_path)
    assert run["state"] == "failed"
    assert "every task diverged" in run["message"]
    text = shown(tmp_path)
    assert "bad failed: every task diverged" in text
    assert f"fit -c {tmp_path}/bad/config.yaml --ckpt_path last" in text


def test_failure_after_training_is_recorded(tmp_path, capsys, listed, monkeypatch):
    monkeypatch.setattr(
        "l2l_scale.cli.fit.export_rule", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    fails(["fit", "-c", SMOKE, "--run_dir", str(tmp_path / "run"), *SMALL], capsys, code=1)
    assert [(run["state"], run["message"]) for run in listed(tmp_path)] == [("failed", "full")]


def test_killed_run_is_seen_and_goes_on(tmp_path, listed, shown):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "l2l_scale", "fit", "-c", SMOKE, "--run_dir", str(folder), SMALL[0]]
    options = ["--trainer.max_steps=1000000", "--data.windows_per_epoch=10"]
    options += ["--checkpoint.every_n_meta_steps=10"]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert listed(tmp_path)[0]["state"] == "running"
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert listed(tmp_path)[0]["state"] == "killed"  # a zombie
    (run,) = listed(tmp_path)
    assert (run["state"], run["starts"]) == ("killed", 1)
    resume = f"l2l-scale fit -c {folder}/config.yaml --ckpt_path last"
    assert run["resume"] == resume
    assert resume in shown(tmp_path)
    steps = -(-run["meta_step"] // 10) * 10 + 10
    main([*resume.split()[1:], f"--trainer.max_steps={steps}"])
    (run,) = listed(tmp_path)
    assert (run["state"], run["starts"], run["meta_step"]) == ("finished", 2, steps)


def test_overwritten_run_starts_to_count_anew(make, listed, tmp_path):
    folder = make("a", {"starts": 7})
    (folder / f".{RUN_FILE}.1.tmp").touch()  # left by a kill in the middle of a write
    fit(folder, "--overwrite=true")
    assert listed(folder)[0]["starts"] == 1
    assert [path.name for path in folder.glob(".*")] == [".lock"]


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({"host": "elsewhere", "updated": 1}, "running"),
        ({"host": "elsewhere", "updated": 6}, "silent"),
        ({"pid": os.getpid(), "process_started": 1e9}, "killed"),  # the pid was given to us since
        ({"pid": -5}, "killed"),
        ({"state": "stopped"}, "stopped"),
        ({"state": "requeued"}, "requeued"),
    ],
)
def test_state_of_a_run_whose_process_cannot_speak(make, listed, change, state):
    if "updated" in change:  # minutes ago, from now on
        change = {**change, "updated": ago_(minutes=change["updated"])}
    assert listed(make("a", {"state": "running", **change}))[0]["state"] == state


def test_queue_is_asked_once_and_only_for_what_may_wait(make, listed, shown, slurm, tmp_path):
    calls = slurm("7 PENDING", "8_3 RUNNING", "garbage")
    old = {"host": "elsewhere", "updated": ago_(hours=1)}
    make("a", {"state": "running", "slurm_job": "7", **old})
    make("b", {"state": "running", "slurm_job": "8_3", **old})
    make("c", {"state": "requeued", "slurm_job": "7"})
    make("d", {"state": "requeued", "slurm_job": "9"})
    make("e", {"state": "finished", "slurm_job": "10"})
    states = [run["state"] for run in listed(tmp_path, "--sort=name")]
    assert states == ["queued", "silent", "queued", "requeued", "finished"]
    assert [line.split()[-1] for line in calls.read_text().splitlines()] == ["--jobs=7,8_3,9"]
    assert "SLURM job" in shown(tmp_path)


def test_without_squeue_or_with_a_failing_one_states_stay(make, listed, slurm, monkeypatch, tmp_path):
    make("a", {"state": "requeued", "slurm_job": "7"})
    slurm("7 PENDING").with_name("squeue").write_text("#!/bin/sh\nexit 1\n")
    assert listed(tmp_path)[0]["state"] == "requeued"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listed(tmp_path)[0]["state"] == "requeued"


def test_broken_files_are_named_and_break_nothing(make, listed, shown, tmp_path):
    make("a", "")
    make("b", '{"state": "running"}')
    make("c", "\x00\x01")
    (make("d", None) / "config.yaml").write_text("run_dir: x\n a: [\n")
    metrics = make("e", None) / "metrics.csv"
    metrics.write_text('step,valid/sum\n2,7.5\n4,nan\n5,"')
    os.utime(metrics, (1e9, 1e9))  # before the rule was exported
    folder = make("[red]f", {})
    (folder / "metrics.csv").unlink()
    (folder / "config.yaml").unlink()
    states = {run["name"]: run["state"] for run in listed(tmp_path)}
    assert states == {**dict.fromkeys("abcd", "unreadable"), "e": "finished", "[red]f": "finished"}
    text = shown(tmp_path)
    assert "a unreadable: run.json" in text
    assert "d unreadable: config.yaml" in text
    assert "[red]f" in text


def test_runs_without_run_json_are_shown_as_far_as_known(make, listed, shown, tmp_path):
    old, best = make("old", None), read_record(make("copy", {}))["best"]
    (run,) = listed(old)
    assert (run["state"], run["meta_step"], run["max_steps"]) == ("finished", 4, 4)
    assert run["best"]["meta_step"] == best["meta_step"]
    assert run["best"]["value"] == pytest.approx(best["value"], rel=1e-6)
    (old / "rule.safetensors").unlink()
    assert listed(old)[0]["state"] == "unknown"
    (old / "metrics.csv").unlink()
    shutil.rmtree(old / "checkpoints")
    (run,) = listed(old)
    assert (run["state"], run["meta_step"], run["max_steps"], run["updated"]) == ("new", None, 4, None)
    assert "– / 4" in shown(old)


def test_sorting(make, listed, tmp_path):
    def best(value):
        return {"monitor": "valid/sum", "value": value, "meta_step": 1}

    make("a", {"best": best(2.0), "updated": ago_(hours=2)})
    make("b", {"best": None, "updated": ago_(hours=1)})
    make("c", {"best": best(1.0), "updated": ago_(hours=3)})
    names = {
        order: "".join(run["name"] for run in listed(tmp_path, f"--sort={order}"))
        for order in ("updated", "name", "best")
    }
    assert names == {"updated": "bac", "name": "abc", "best": "cab"}
    for name in "ac":
        record = json.loads((tmp_path / name / RUN_FILE).read_text())
        (tmp_path / name / RUN_FILE).write_text(json.dumps({**record, "mode": "max"}))
    assert "".join(run["name"] for run in listed(tmp_path, "--sort=best")) == "acb"


def test_nested_sweeps_are_found_each_run_once(make, listed, tmp_path):
    make("sweep/rate=0.1/seed=0", {})
    make("sweep/rate=0.1/seed=1", {})
    make("deep/1/2/3/4/5/6", {})
    for inside in ("wandb", "evaluation", ".hidden"):
        make(f"sweep/rate=0.1/seed=0/{inside}/x", {})
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("wandb_version: 1\n")
    names = ["sweep/rate=0.1/seed=0", "sweep/rate=0.1/seed=1"]
    assert [run["name"] for run in listed(tmp_path, "--sort=name")] == names
    both = listed(tmp_path / "sweep", tmp_path, "--sort=name")
    assert [run["name"] for run in both] == [str(tmp_path / name) for name in names]


def test_empty_and_missing_folders(listed, shown, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert listed() == []
    assert "no run folders in runs; l2l-scale fit makes them" in shown()
    assert "FOLDER (nowhere): there is no such folder" in fails(["runs", "nowhere"], capsys)
    assert "'best'" in fails(["runs", "--sort=bets"], capsys)


def test_only_some_commands_are_shown(make, shown, tmp_path):
    for number in range(7):
        make(f"run {number}", {"state": "stopped"})
    text = shown(tmp_path)
    assert text.count("--ckpt_path last") == 5 + 1
    assert f"fit -c '{tmp_path}/run 0/config.yaml'" in text
    assert "and 2 more" in text


def test_torch_is_not_imported(make, tmp_path):
    make("a", {"state": "running", "pid": -5})
    make("b", None)
    code = (
        f"import sys; from l2l_scale.cli.main import main; main(['runs', {str(tmp_path)!r}]);"
        "print(sorted({'torch', 'lightning', 'numpy', 'ray'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ages_in_words():
    words = ["0 s ago", "59 s ago", "1 min ago", "59 min ago", "1 h ago", "2 d ago"]
    assert [ago(seconds) for seconds in (0, 59.4, 60, 3599, 3600, 2.9 * 86400)] == words
