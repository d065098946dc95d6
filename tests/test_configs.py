"""Every YAML file parses, builds, and runs: two meta-steps and a tiny evaluation."""

import json
from pathlib import Path

import pytest
from conftest import shared_data

from l2l_scale.cli.evaluate import run as evaluate
from l2l_scale.cli.fit import Fit

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/**/*.yaml"))
TINY = [
    "--trainer.max_steps",
    "2",
    "--data.windows_per_epoch",
    "2",
    "--data.valid_tasks",
    "2",
    "--data.slots",
    "2",
]


TINY_EVALUATION = [
    *("--evaluation.num_tasks", "2", "--evaluation.num_tuning_tasks", "2", "--evaluation.baselines", "[SGD]"),
    *("--evaluation.num_shift_tasks", "2", "--evaluation.num_shift_tuning_tasks", "2"),
    *(
        "--evaluation.num_reference_tasks",
        "2",
        "--evaluation.inner_steps",
        "100",
        "--evaluation.shift_inner_steps",
        "100",
        "--evaluation.num_workers",
        "1",
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_evaluates(config, tmp_path):
    data = ["--data.family.dataset", shared_data("mnist")] if "mnist" in config.name else []
    fit = Fit(["-c", str(config), "--run_dir", str(tmp_path), *TINY, *data])
    fit.train()
    assert fit.trainer.global_step == 2
    assert (tmp_path / "config.yaml").is_file()
    assert (tmp_path / "metrics.csv").is_file()
    evaluate(["-c", str(tmp_path / "config.yaml"), *TINY_EVALUATION])
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert report["horizon"] == fit.datamodule.schedule.horizon
    assert set(report["tests"]["held-out"]["optimizers"]) >= {"learned", "SGD"}
