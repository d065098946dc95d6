"""Every YAML file parses, builds, and runs: two meta-steps and a tiny evaluation.

Overlays run on the smoke configuration, and each must have the effect that it is for.
"""

import json
from pathlib import Path

import pytest
from conftest import shared_data

from l2l_scale.cli.evaluate import run as evaluate
from l2l_scale.cli.fit import Fit

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
OVERLAYS = sorted(FOLDER.glob("overlays/*.yaml"))
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


def wandb_effect(fit, folder):
    """A run of W&B in the run folder, and the picture of a validation."""
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert (folder / "validation.png").is_file()


EFFECTS = {"wandb": wandb_effect}
"""What an overlay does, by its name; each takes what was fitted and the run folder."""


def test_effect_of_every_overlay_is_tested():
    assert set(EFFECTS) == {path.stem for path in OVERLAYS}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_has_its_effect(overlay, tmp_path):
    base = ["-c", str(FOLDER / "smoke.yaml")]
    fit = Fit([*base, "-c", str(overlay), "--run_dir", str(tmp_path), *TINY])
    fit.train()
    assert fit.trainer.global_step == 2
    assert (tmp_path / "metrics.csv").is_file()
    EFFECTS[overlay.stem](fit, tmp_path)
