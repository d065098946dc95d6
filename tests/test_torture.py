"""Killed runs come out as undisturbed ones; and what judges that notices a single bit."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2l_scale.cli.main import main
from l2l_scale.training.checkpoints.folder import TRAINING, old_of, read_tensors, write_tensors

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def torture(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, "scripts/torturing", *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (10, ["--meta_steps", "100"]),
        (2, ["--meta_steps", "50", "--ranks", "2"]),
        (1, ["--meta_steps", "50", "--fresh"]),
    ],
    ids=["1 rank", "2 ranks", "fresh interpreters"],
)
def test_killed_runs_come_out_as_undisturbed_ones(kills, options):
    done = torture("--kills", str(kills), *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{kills} kills, 0 differences"


def test_a_run_that_fails_is_a_failure_and_is_kept(tmp_path):
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "undisturbed" / "mine").touch()
    done = torture("--kills", "1", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "undisturbed ended with code 2" in done.stdout
    assert "is not empty" in (tmp_path / "undisturbed.log").read_text()
    assert f"the runs are in {tmp_path}" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 kills, 0 differences"


@pytest.mark.parametrize("option", ["--kills=0", "--ranks=0", "--actors=-1", "--meta_steps=30"])
def test_what_makes_no_sense_is_refused(option):
    done = torture(option)
    assert done.returncode == 2
    assert option.split("=")[0] in done.stderr


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts/torturing")
    yield importlib.import_module("compare")
    del sys.modules["compare"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder."""
    folder = tmp_path_factory.mktemp("torture") / "run"
    options = ["--trainer.max_steps", "25", "--checkpoint.every_n_meta_steps", "5"]
    main(["fit", "-c", str(ROOT / "configs/smoke.yaml"), "--run_dir", str(folder), *options])
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def flip(tensor):
    """Flip the last bit of a number."""
    tensor.view(torch.uint8).flatten()[0] ^= 1


def test_one_bit_of_a_slot_is_a_difference(compare, finished, copy):
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(copy)))
    assert compare.differences(finished, copy) == []
    (file,) = (copy / "checkpoints/last").glob("slots-*")
    content = read_tensors(file)
    flip(content[0][""]["leaves"][1])
    write_tensors(file, content)
    assert compare.differences(finished, copy) == [f"{file.name}.0..leaves.1"]


def test_one_bit_of_the_best_rule_is_a_difference(compare, finished, copy):
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(copy)))
    file = copy / "checkpoints/last" / TRAINING
    content = read_tensors(file)
    phi = content["callbacks"]["Checkpoints"]["best"]["phi"]
    name = next(iter(phi))
    flip(phi[name])
    write_tensors(file, content)
    with (copy / "rule.safetensors").open("ab") as rule:
        rule.write(b"0")
    found = compare.differences(finished, copy)
    assert found == [f"checkpoint.callbacks.Checkpoints.best.phi.{name}", "rule.safetensors"]


def test_a_checkpoint_that_is_not_whole_is_damage(compare, copy):
    assert compare.damage(copy / "checkpoints") == []
    last = (copy / "checkpoints/last").resolve()
    os.truncate(last / TRAINING, 100)
    first, second = compare.damage(copy / "checkpoints")
    assert "it has 100 bytes" in first
    assert "last points to no whole checkpoint" in second


def test_a_checkpoint_that_is_being_replaced_is_none(compare, copy):
    last = (copy / "checkpoints/last").resolve()
    last.rename(old_of(last))
    assert compare.damage(copy / "checkpoints") == []
    shutil.rmtree(old_of(last))
    assert "last points to no whole checkpoint" in compare.damage(copy / "checkpoints")[0]
