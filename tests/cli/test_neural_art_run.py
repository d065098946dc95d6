"""The paper's neural art in small: two meta-steps, and an evaluation with pictures of all its tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from l2l_scale.cli.evaluate import run as evaluate
from l2l_scale.cli.fit import Fit
from l2l_scale.tasks import NeuralArt

CONFIG = Path(__file__).parents[2] / "configs" / "paper" / "neural_art.yaml"
SMALL = ["--trainer.max_steps", "2", "--data.windows_per_epoch", "2", "--data.valid_tasks", "1"]
SMALL_EVALUATION = [
    *("--evaluation.num_tasks", "2", "--evaluation.num_tuning_tasks", "1", "--evaluation.baselines", "[SGD]"),
    *("--evaluation.num_shift_tasks", "1", "--evaluation.num_shift_tuning_tasks", "1"),
    *("--evaluation.inner_steps", "8", "--evaluation.shift_inner_steps", "8"),
    *("--evaluation.num_workers", "1", "--evaluation.cache", "false", "--data.horizon", "8"),
]


@pytest.mark.slow
def test_the_configuration_trains_and_evaluates(tmp_path: Path) -> None:
    fit = Fit(["-c", str(CONFIG), "--run_dir", str(tmp_path), *SMALL])
    fit.train()
    assert fit.trainer.global_step == 2
    small = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    families = [small["data"]["family"], *small["evaluation"]["shifts"].values()]
    for family in families:  # so that the test takes seconds
        family["init_args"]["size"] //= 4
    small["data"]["window"] = 8
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    evaluate(["-c", str(tmp_path / "small.yaml"), *SMALL_EVALUATION])
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert list(report["tests"]) == ["held-out", "128 x 128", "new style", "new style, 128 x 128"]
    assert (tmp_path / "evaluation" / "pictures.png").is_file()


def test_the_shifts_are_a_size_and_a_style_that_training_does_not_have() -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    home = NeuralArt(**config["data"]["family"]["init_args"])
    shifts = {name: NeuralArt(**f["init_args"]) for name, f in config["evaluation"]["shifts"].items()}
    assert [shifts[name].size for name in shifts] == [128, 64, 128]
    for name, shift in shifts.items():
        assert bool(set(shift.styles) & set(home.styles)) == ("new style" not in name)
