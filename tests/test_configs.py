"""Every YAML file parses, builds, and runs: two meta-steps and a tiny evaluation.

Overlays run on the smoke configuration, and each must have the effect that it is for.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import shared_data
from lightning.pytorch.strategies import DDPStrategy

from l2l_scale.cli.evaluate import Evaluate
from l2l_scale.cli.evaluate import run as evaluate
from l2l_scale.cli.fit import Fit
from l2l_scale.evaluation.settings import HELD_OUT
from l2l_scale.sampling import PoolSettings
from l2l_scale.tasks import MixedPrecision
from l2l_scale.tasks.hub import DATA_VARIABLE

PoolSettings().prepare_environment()  # before Ray is imported

from l2l_scale.sampling.pool import SamplerPool  # noqa: E402

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
OWN_TESTS = Path(__file__).parent / "cli"
"""Where a configuration of the paper has a test of its own, test_NAME_run.py, as its tasks are large."""
PAPER = sorted(
    path for path in FOLDER.glob("paper/*.yaml") if not (OWN_TESTS / f"test_{path.stem}_run.py").exists()
)
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


@pytest.fixture
def _data(request, monkeypatch):
    """Where the data sets lie that a configuration names; the test is skipped where one is missing."""
    text = request.getfixturevalue("config").read_text(encoding="utf-8")
    for name in set(re.findall(r"\bdataset: (\w+)", text)) - {"digits"}:
        monkeypatch.setenv(DATA_VARIABLE, str(Path(shared_data(name)).parent))


def train_and_evaluate(config, folder, training=(), evaluation=()):
    """Two meta-steps and a tiny evaluation, with these further options; gives the run and the reports."""
    families = Fit(["-c", str(config), "--run_dir", str(folder / "look")]).datamodule.mixture.families
    slots = ["--data.slots", str(max(len(families), 2))]  # one for each at least
    fit = Fit(["-c", str(config), "--run_dir", str(folder), *TINY, *slots, *training])
    fit.train()
    assert fit.trainer.global_step == 2
    assert (folder / "config.yaml").is_file()
    assert (folder / "metrics.csv").is_file()
    evaluate(["-c", str(folder / "config.yaml"), *TINY_EVALUATION, *evaluation])
    reports = [json.loads((folder / "evaluation" / name / "report.json").read_text()) for name in families]
    assert all(set(one["tests"]["held-out"]["optimizers"]) >= {"learned", "SGD"} for one in reports)
    return fit, reports


@pytest.mark.usefixtures("_data")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_and_evaluates(config, tmp_path):
    fit, reports = train_and_evaluate(config, tmp_path)
    horizons = Evaluate(["-c", str(tmp_path / "config.yaml")]).evaluation.horizons
    expected = horizons[0] if horizons else fit.datamodule.schedule.horizon
    assert all(report["horizon"] == expected for report in reports)


@pytest.mark.usefixtures("_data")
@pytest.mark.parametrize("config", PAPER, ids=lambda path: path.stem)
def test_config_of_the_paper_trains_and_evaluates(config, tmp_path):
    """On small minibatches, where there are any, and for five inner steps: these tasks are large."""
    text = config.read_text(encoding="utf-8")
    wrapped = "family." if "MixedPrecision" in text else ""
    small = [f"--data.family.{wrapped}batch_size", "8"] if "batch_size" in text else []
    steps = ["--data.horizon", "5", "--data.window", "5", "--data.curriculum", "null"]
    short = [
        *(
            "--evaluation.horizons",
            "[5]",
            "--evaluation.inner_steps",
            "5",
            "--evaluation.shift_inner_steps",
            "5",
        ),
        *("--evaluation.num_tasks", "1", "--evaluation.num_tuning_tasks", "1"),
        *("--evaluation.num_shift_tasks", "1", "--evaluation.num_shift_tuning_tasks", "1"),
    ]
    asked = Evaluate(["-c", str(config), "--run_dir", str(tmp_path)]).evaluation
    _, (report,) = train_and_evaluate(config, tmp_path, [*steps, *small], short)
    assert report["horizon"] == 5
    assert set(report["tests"]) == {HELD_OUT, *(asked.shifts or {})}


def wandb_effect(fit, folder):
    """A run of W&B in the run folder, and the picture of a validation."""
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert (folder / "validation.png").is_file()


def two_processes_effect(fit, folder):
    """See tests/cli, where they are started."""
    assert (fit.trainer.num_devices, fit.trainer.world_size) == (2, 2)
    assert isinstance(fit.trainer.strategy, DDPStrategy)


def ddp_effect(fit, folder):
    """Of as many ranks as there are devices: here one."""
    assert isinstance(fit.trainer.strategy, DDPStrategy)


def bf16_effect(fit, folder):
    """Only the tasks are computed in 16 bits."""
    assert all(isinstance(family, MixedPrecision) for family in fit.model.families.values())
    assert all(parameter.dtype == torch.float32 for parameter in fit.model.parameters())


def actors_effect(fit, folder):
    """There were actors, and they are gone."""
    assert isinstance(fit.trainer.train_dataloader.draw, SamplerPool)
    assert fit.datamodule.actors.pool is None


EFFECTS = {
    "actors": actors_effect,
    "bf16": bf16_effect,
    "cpu2": two_processes_effect,
    "ddp": ddp_effect,
    "wandb": wandb_effect,
}
"""What an overlay does, by its name; each takes what was fitted and the run folder."""


def test_effect_of_every_overlay_is_tested():
    assert set(EFFECTS) == {path.stem for path in OVERLAYS}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_has_its_effect(overlay, tmp_path):
    base = ["-c", str(FOLDER / "smoke.yaml")]
    fit = Fit([*base, "-c", str(overlay), "--run_dir", str(tmp_path), *TINY])
    if fit.trainer.num_devices == 1:  # else Lightning would start pytest once more
        fit.train()
        assert fit.trainer.global_step == 2
        assert (tmp_path / "metrics.csv").is_file()
    EFFECTS[overlay.stem](fit, tmp_path)
