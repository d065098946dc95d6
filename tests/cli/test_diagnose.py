"""``l2l-scale diagnose`` as a user meets it: a run is read and left as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from l2l_scale.cli.diagnose import default_tasks, default_workers
from l2l_scale.cli.main import main
from l2l_scale.deploy import load_rule, save_rule
from l2l_scale.diagnosis import Subject
from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.optimizers import SGD
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
QUIET = "--trainer.enable_progress_bar=false"
MIXTURE = """
data:
  family:
    class_path: Mixture
    init_args:
      members:
        small: {family: {class_path: Quadratic, init_args: {dimension: 2}}}
        large: {family: {class_path: Quadratic, init_args: {dimension: 4}}}
"""
IMITATION = """
model:
  rule: {class_path: CoordinatewiseLSTM, init_args: {hidden_size: 4}}
  estimator: Imitation
data:
  family: {class_path: ImageClassifier, init_args: {dataset: digits, hidden: [4], batch_size: 8}}
  horizon: 20
  window: 5
  slots: 2
  windows_per_epoch: 2
  teacher: {class_path: Adam, init_args: {learning_rate: 0.01}}
  teacher_iterates: true
trainer: {max_steps: 2}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    main(["fit", "-c", SMOKE, "--run_dir", str(folder), QUIET])
    return folder


@pytest.fixture
def fresh(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "smoke", symlinks=True)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_healthy_run_has_no_problems_and_stays_as_it_was(fresh, capsys):
    before = contents(fresh)
    main(["diagnose", str(fresh)])
    said = capsys.readouterr().out
    after = contents(fresh)
    new = {f"diagnosis/diagnosis.{kind}" for kind in ("png", "md", "json")}
    assert {name: value for name, value in after.items() if name not in new} == before
    assert after.keys() - before.keys() == new
    report = json.loads((fresh / "diagnosis" / "diagnosis.json").read_text())
    assert "problem" not in {finding["severity"] for finding in report["findings"]}
    assert "read from: " in said
    assert "checkpoints/last, 50 meta-steps" in report["run"]["read from"]
    one = report["families"][""]
    assert len(one["losses"]) == 21
    assert one["meta_gradient"]["inner_steps"] == [0, 5, 10, 15]
    assert {gate["name"] for gate in one["gates"]} == {"input", "forget", "output", "candidate"}
    text = (fresh / "diagnosis" / "diagnosis.md").read_text()
    assert all(finding["text"] in text for finding in report["findings"])
    assert "![what was measured](diagnosis.png)" in text
    main(["diagnose", str(fresh)])  # once more: the same numbers
    again = json.loads((fresh / "diagnosis" / "diagnosis.json").read_text())
    assert again["families"] == report["families"]


def test_the_exported_rule_is_taken_where_there_is_no_checkpoint(fresh, capsys):
    shutil.rmtree(fresh / "checkpoints")
    main(["diagnose", str(fresh), "--tasks=2", "--split=train", "--out", str(fresh / "elsewhere")])
    assert "rule.safetensors, 50 meta-steps" in capsys.readouterr().out.replace("\n", "")
    assert (fresh / "elsewhere" / "diagnosis.png").is_file()
    (fresh / "rule.safetensors").unlink()
    assert "neither a checkpoint nor rule.safetensors" in fails(["diagnose", str(fresh)], capsys)


def test_a_dead_rule_is_found(trained, tmp_path, capsys):
    rule = load_rule(trained / "rule.safetensors")
    torch.nn.init.zeros_(rule.output.weight)
    torch.nn.init.zeros_(rule.output.bias)
    dead = str(save_rule(rule, tmp_path / "dead.safetensors"))
    main(["diagnose", str(trained), "--rule", dead, "--out", str(tmp_path / "out")])
    assert "the rule is dead" in " ".join(capsys.readouterr().out.split())
    findings = json.loads((tmp_path / "out" / "diagnosis.json").read_text())["findings"]
    assert (findings[0]["severity"], findings[0]["subject"]) == ("problem", "updates")


def test_a_mixture_is_looked_at_family_by_family(tmp_path, capsys):
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    run = str(tmp_path / "run")
    rule = ["--model.rule=CoordinatewiseLSTM", "--model.rule.hidden_size=4", "--data.slots=4"]
    small = ["--data.horizon=10", "--data.window=5", "--data.windows_per_epoch=2", "--trainer.max_steps=2"]
    main(["fit", "-c", str(tmp_path / "mixture.yaml"), *rule, *small, QUIET, "--run_dir", run])
    main(["diagnose", run, "--tasks=2"])
    report = json.loads((tmp_path / "run" / "diagnosis" / "diagnosis.json").read_text())
    assert report["families"].keys() == {"small", "large"}
    assert {finding["family"] for finding in report["findings"]} == {"small", "large", ""}
    assert (tmp_path / "run" / "diagnosis" / "diagnosis-large.png").is_file()
    assert "small" in capsys.readouterr().out


def test_an_imitator_is_compared_with_its_teacher(tmp_path, capsys):
    (tmp_path / "imitation.yaml").write_text(IMITATION)
    run = tmp_path / "run"
    main(["fit", "-c", str(tmp_path / "imitation.yaml"), QUIET, "--run_dir", str(run)])
    main(["diagnose", str(run), "--tasks=2"])
    report = json.loads((run / "diagnosis" / "diagnosis.json").read_text())
    imitation = report["families"][""]["imitation"]
    assert imitation["errors"].keys() == {"linear", "bias"}
    assert [len(errors) for errors in imitation["errors"].values()] == [20, 20]
    assert len(imitation["teacher_losses"]) == 20
    assert {"imitation", "own way"} <= {finding["subject"] for finding in report["findings"]}
    assert "data.staggered 2" in " ".join(capsys.readouterr().out.split())


def fails(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2, error
    assert "Traceback" not in error
    return error


def test_what_is_no_run_is_refused(tmp_path, trained, capsys):
    assert "there is no such folder" in fails(["diagnose", str(tmp_path / "no")], capsys)
    assert "is no run folder" in fails(["diagnose", str(tmp_path)], capsys)
    assert "no.safetensors" in fails(["diagnose", str(trained), "--rule=no.safetensors"], capsys)
    assert "tasks" in fails(["diagnose", str(trained), "--tasks=0"], capsys)


def test_much_work_is_spread_over_the_cores(monkeypatch):
    monkeypatch.setattr("l2l_scale.cli.diagnose.available_cores", lambda: 7)
    few = Subject(
        rule=SGD(learning_rate=0.1),
        family=Quadratic(dimension=10),
        schedule=Schedule(horizon=100, window=20),
        estimator=TruncatedBPTT(),
    )
    assert default_workers([few]) == 1
    assert default_workers([few] * 251) == 7


def test_large_tasks_are_fewer():
    assert [default_tasks(size) for size in (3, 5_000, 10_000, 16_000, 10**7)] == [8, 8, 4, 2, 2]
