"""``l2l-scale slurm`` with a stand-in for sbatch; tests/slurm submits for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from l2l_scale.cli.main import main
from l2l_scale.cli.slurm_script import find_templates

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/smoke.yaml")
SBATCH = """#!/bin/bash
env >"$SEEN"
[[ -z "$REFUSE" ]] || { echo "sbatch: error: $REFUSE" >&2; exit 1; }
echo "42;cluster"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder that is a git checkout, with code of the user's own."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("L2L_SCALE_RUN_DIR", raising=False)
    monkeypatch.setenv("L2L_SCALE_RUN_DIR", "")  # so that what the command sets is undone
    monkeypatch.delenv("L2L_SCALE_RUN_DIR")
    subprocess.run(["git", "init", "-q"], check=True)
    (folder / ".gitignore").write_text("runs/\nsecret\n")
    (folder / "mine.py").write_text("value = 1\n")
    (folder / "secret").write_text("key")
    (folder / "large.bin").write_bytes(b"0" * (2**20 + 1))
    return folder


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Where the stand-in for sbatch writes the environment that it was given."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin/sbatch"
    path.write_text(SBATCH)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("REFUSE", "")
    return tmp_path / "seen"


def mistake(capsys, *arguments: str) -> str:
    """The message of a mistake; nothing must have been written."""
    with pytest.raises(SystemExit) as stop:
        main(["slurm", *arguments])
    assert stop.value.code == 2
    assert not Path("runs").exists()
    return capsys.readouterr().err


def test_dry_run_shows_script_and_command_and_writes_nothing(folder, capsys):
    arguments = [
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--time",
        "8:00:00",
        "--partition",
        "big",
        "--dry-run",
    ]
    main(
        ["slurm", SMOKE, *arguments, "--sbatch", "--mail-user=me --comment='two words'", "--data.slots", "16"]
    )
    said = capsys.readouterr().out
    run = folder / "runs/smoke"
    for line in (
        "#SBATCH --requeue",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=8:00:00",
        "#SBATCH --partition=big",
        "#SBATCH --mail-user=me",
        '#SBATCH "--comment=two words"',
        f"#SBATCH --output={run}/slurm-%j.log",
        f'set -- -c {run}/config.yaml --run_dir {run} "$@"',
        f"sbatch {run}/job.sbatch",
    ):
        assert line in said.splitlines()
    assert not Path("runs").exists()
    subprocess.run(["bash", "-n"], input=said, text=True, check=True)


def test_submission_makes_the_run_folder_and_says_how_to_follow(folder, seen, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_CONF", "there")
    main(["slurm", SMOKE, "--run_dir", "runs/a b", "--data.slots", "4", "--check_memory", "false"])
    said, run = capsys.readouterr().out, folder / "runs/a b"
    for part in ("job 42", f"tail -F {run}/slurm-42.log", "squeue -j 42", "scancel 42", "l2l-scale runs"):
        assert part in said
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["slots"] == 4
    script = (run / "job.sbatch").read_text()
    assert f'#SBATCH "--output={run}/slurm-%j.log"' in script
    assert "--check_memory false" in script
    copied = {path.relative_to(run / "code").as_posix() for path in (run / "code").rglob("*")}
    assert {"mine.py", "l2l_scale/cli/main.py", "slurm/env.sh", "slurm/train.sbatch"} <= copied
    assert not {"secret", "large.bin"} & copied
    assert not any("__pycache__" in name for name in copied)
    given = dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)
    assert given["SLURM_CONF"] == "there"
    assert not {"SLURM_NTASKS", "L2L_SCALE_RUN_DIR"} & given.keys()


def test_snapshot_wins_over_the_checkout(folder, seen):
    """What a job runs stays what it was when it was submitted, its package and the user's own code."""
    main(["slurm", SMOKE, "--run_dir", "runs/x"])
    (folder / "mine.py").write_text("value = 2\n")
    code = (
        "import sys\n"
        "sys.path.pop(0)  # the working folder, which the command's own script has not\n"
        "from l2l_scale.cli import main\n"
        "try: main(['nothing'])\n"
        "except SystemExit: import mine, l2l_scale\n"
        "print(mine.value, l2l_scale.__file__)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(folder / "runs/x/code")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
    )
    assert done.stdout.splitlines()[-1] == f"1 {folder}/runs/x/code/l2l_scale/__init__.py"


def test_refused_job_leaves_no_folder(seen, capsys, monkeypatch):
    monkeypatch.setenv("REFUSE", "Invalid account")
    with pytest.raises(SystemExit) as stop:
        main(["slurm", SMOKE, "--run_dir", "runs/x"])
    assert stop.value.code == 1
    assert "Invalid account" in capsys.readouterr().err
    assert not Path("runs/x").exists()


def test_mistakes_cost_no_time_in_the_queue(capsys, monkeypatch):
    for arguments, message in (
        ([SMOKE, "--data.slotz", "4"], "did you mean"),
        ([SMOKE, "--nodes", "3", "--data.slots", "4"], "slots"),
        ([SMOKE, "--data.windows_per_epoch", "7", "--trainer.max_steps", "10"], "max_steps (10)"),
        ([SMOKE, "--trainer.devices", "3"], "trainer.devices (3) must be 1"),
        ([SMOKE, "--trainer.num_nodes", "3"], "trainer.num_nodes (3) must be 1"),
        ([SMOKE, "--trainer.accelerator", "gpu"], "--gpus-per-node"),
        ([SMOKE, "--overwrite", "true"], "overwrite (true)"),
        ([SMOKE, "--ckpt_path", "a.ckpt"], "ckpt_path (a.ckpt)"),
        ([SMOKE, "--data.pool.num_actors", "3"], "--cpus-per-task"),
        ([SMOKE, "--gpus-per-node", "2", "--ntasks-per-node", "1"], "ntasks-per-node (1)"),
        ([SMOKE, "--nodes", "0"], "nodes (0)"),
        ([SMOKE, "--nodes", "two"], "invalid int value: 'two'"),
        ([SMOKE, "--seeds", "a"], "seeds (a)"),
        ([SMOKE, "--seeds", "0-3", "--sampling-nodes", "1"], "sampling-nodes"),
        ([SMOKE, "--sweep", "there is none"], "sweep (there is none)"),
        ([SMOKE, "--sampling-nodes", "1", "--ntasks-per-node", "2", "--data.slots", "4"], "one CPU for each"),
        (["--nodes", "2"], "name a configuration"),
    ):
        assert message in mistake(capsys, *arguments), arguments
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no sbatch on this machine" in mistake(capsys, SMOKE)


def test_mistake_in_a_line_of_a_sweep(folder, capsys):
    (folder / "sweep.txt").write_text("--data.slots 4\n--data.slotz 5\n")
    assert "did you mean" in mistake(capsys, SMOKE, "--sweep", "sweep.txt")


def test_arrays(folder, seen, capsys):
    (folder / "sweep.txt").write_text("# comment\n--data.slots 4\n\n--data.slots 8\n")
    main(["slurm", SMOKE, "--run_dir", "runs/x", "--sweep", "sweep.txt"])
    run, said = folder / "runs/x", capsys.readouterr().out
    script = (run / "job.sbatch").read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert f"export L2L_SCALE_SWEEP={run}/sweep.txt\n" in script
    assert (run / "sweep.txt").read_text() == "--data.slots 4\n--data.slots 8\n"
    assert f"tail -F {run}/slurm-42_*.log" in said
    main(["slurm", SMOKE, "--seeds", "0-7%2", "--dry-run"])
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-7%2\n" in said
    assert "export L2L_SCALE_SWEEP" not in said


def test_sampling_nodes_are_a_second_component(capsys):
    size = ["--sampling-nodes", "2", "--sampling-cpus", "8", "--sampling-partition", "cpu"]
    main(["slurm", SMOKE, *size, "--time", "1:00:00", "--data.pool.num_actors", "5", "--dry-run"])
    said = capsys.readouterr().out
    second = "--nodes=2 --ntasks-per-node=1 --cpus-per-task=8 --time=1:00:00 --partition=cpu"
    assert f"#SBATCH hetjob\n#SBATCH {second}\n" in said
    assert "--data.pool.num_actors 5" in said


def test_templates_come_from_here_or_from_the_checkout(folder):
    assert find_templates() == ROOT / "slurm"
    (folder / "slurm").mkdir()
    (folder / "slurm/train.sbatch").write_text("")
    assert find_templates() == folder / "slurm"


def test_help_says_what_must_be_shared(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["slurm", "--help"])
    assert stop.value.code == 0
    assert "that all nodes share" in " ".join(capsys.readouterr().out.split())
