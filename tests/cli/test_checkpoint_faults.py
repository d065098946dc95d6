"""Damaged checkpoints and disks that fail, on the command line: one line, an exit code, nothing lost."""

import csv
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from l2l_scale.cli.main import main
from l2l_scale.training.checkpoints.folder import TRAINING, read_tensors
from l2l_scale.training.checkpoints.shelf import checkpoints_in

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
OPTIONS = [
    "--trainer.enable_progress_bar=false",
    "--checkpoint.every_n_meta_steps=5",
    "--checkpoint.keep_last=99",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 50 meta-steps with a checkpoint after every fifth."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    main(["fit", "-c", SMOKE, "--run_dir", str(folder), *OPTIONS])
    return folder


@pytest.fixture
def stopped(trained, tmp_path):
    """The run as if it had been stopped after meta-step 35."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "rule.safetensors").unlink()
    for path in checkpoints_in(tmp_path / "run" / "checkpoints"):
        if int(path.name[-8:]) > 35:
            shutil.rmtree(path)
    return tmp_path / "run"


def fails(arguments, capsys, code=2) -> str:
    """The one line that a failing command says of its failure."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == code, error
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith(f"l2l-scale {arguments[0]}: "))
    return line


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(run, ckpt_path="last"):
    return ["fit", "-c", str(run / "config.yaml"), "--run_dir", str(run), *OPTIONS, "--ckpt_path", ckpt_path]


def damage(path, name=TRAINING):
    (path / name).write_bytes((path / name).read_bytes()[:-100])


@pytest.mark.parametrize("name", ["manifest.json", TRAINING, "slots-00000-of-00001.pt", "config.yaml"])
def test_run_goes_on_from_the_checkpoint_before_and_ends_as_undisturbed(trained, stopped, name):
    damage(stopped / "checkpoints" / "step-00000035", name)
    with pytest.warns(UserWarning, match=rf"step-00000035.*{name}.*Taking .*step-00000030, which is whole"):
        main(resume(stopped))
    assert (stopped / "rule.safetensors").read_bytes() == (trained / "rule.safetensors").read_bytes()
    rows = [list(csv.DictReader((run / "metrics.csv").open()))[-1] for run in (trained, stopped)]
    assert rows[0]["valid/sum"] == rows[1]["valid/sum"]


def test_damaged_checkpoint_that_was_named_is_refused_and_nothing_changes(stopped, capsys):
    path = stopped / "checkpoints" / "step-00000035"
    damage(path)
    before = files_of(stopped)
    assert f"{path / TRAINING} is damaged: it has" in fails(resume(stopped, str(path)), capsys)
    assert files_of(stopped) == before
    for command in ("export", "evaluate"):
        arguments = (
            [command, str(path)] if command == "export" else [command, "-c", SMOKE, "--rule", str(path)]
        )
        assert f"{path / TRAINING} is damaged" in fails(arguments, capsys)
    assert files_of(stopped) == before


def test_where_all_are_damaged_the_way_out_is_said(stopped, capsys):
    for path in checkpoints_in(stopped / "checkpoints"):
        damage(path)
    before = files_of(stopped)
    for arguments in (resume(stopped), ["export", str(stopped)]):
        error = fails(arguments, capsys)
        assert "is whole" in error
        assert "--overwrite true" in error
        assert "step-00000035" in error
    assert files_of(stopped) == before


def test_export_of_a_run_takes_the_last_whole_checkpoint(trained, stopped, tmp_path):
    damage(stopped / "checkpoints" / "step-00000035")
    with pytest.warns(UserWarning, match="Taking .*step-00000030"):
        main(["export", str(stopped), "--out", str(tmp_path / "a")])
    main(["export", str(trained / "checkpoints" / "step-00000025"), "--out", str(tmp_path / "b")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()  # 25 was validated last


def test_link_that_points_nowhere_is_no_obstacle(trained, stopped):
    (stopped / "checkpoints" / "last").unlink()
    (stopped / "checkpoints" / "last").symlink_to("step-99999999")
    main(resume(stopped, str(stopped / "checkpoints" / "last")))
    assert (stopped / "rule.safetensors").read_bytes() == (trained / "rule.safetensors").read_bytes()


def test_checkpoint_that_waited_to_be_replaced_is_not_taken_for_a_fresh_start(trained, stopped):
    for path in checkpoints_in(stopped / "checkpoints")[:-1]:
        shutil.rmtree(path)
    (stopped / "checkpoints" / "last").unlink()
    (stopped / "checkpoints" / "step-00000035").rename(stopped / "checkpoints" / ".step-00000035.old")
    main(resume(stopped))
    assert (stopped / "rule.safetensors").read_bytes() == (trained / "rule.safetensors").read_bytes()


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("command", ["fit", "export", "evaluate"])
def test_malicious_file_executes_nothing(stopped, tmp_path, command, capsys):
    target, file = tmp_path / "executed", tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.0.0", "l2l_scale": Command(target)}, file)
    arguments = {
        "fit": [*resume(stopped, str(file)), "--run_dir", str(tmp_path / "new")],
        "export": ["export", str(file)],
        "evaluate": ["evaluate", "-c", SMOKE, "--rule", str(file)],
    }[command]
    before = files_of(stopped)
    assert "x.ckpt" in fails(arguments, capsys)
    assert not target.exists()
    assert files_of(stopped) == before


def test_file_in_place_of_the_checkpoints_ends_the_run_with_exit_code_1(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    options = ["--checkpoint.dirpath", str(tmp_path / "file"), "--run_dir", str(tmp_path / "run"), *OPTIONS]
    error = fails(["fit", "-c", SMOKE, *options], capsys, code=1)
    assert f"cannot write the checkpoint {tmp_path / 'file' / 'step-00000005'}: Not a directory" in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_checkpoint_that_does_not_fit_ends_the_run_with_exit_code_1_and_costs_nothing(stopped, trained):
    """In a process of its own, whose files may not grow beyond what the earlier checkpoints needed."""
    import resource
    import subprocess

    size = (stopped / "checkpoints" / "step-00000035" / TRAINING).stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
    command = [sys.executable, "-m", "l2l_scale", *resume(stopped)]
    done = subprocess.run(
        command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "step-00000040: File too large; the last whole checkpoint is " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((stopped / "checkpoints").glob(".step-*"))
    main(resume(stopped))
    assert (stopped / "rule.safetensors").read_bytes() == (trained / "rule.safetensors").read_bytes()
    assert read_tensors(stopped / "checkpoints" / "last" / TRAINING)["global_step"] == 50
