"""Every YAML file parses, builds, and runs: two meta-steps and a tiny evaluation."""

from pathlib import Path

import pytest
from conftest import shared_data

from l2l_scale.cli.experiment import Reader
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


class Show(Reader):
    description = "test"

    def add_options(self, parser):
        pass


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_what_it_says(config):
    show = Show(["-c", str(config)])
    assert show.horizon % show.config_init.data.schedule.window == 0
    assert show.config_init.model.rule is not None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(config, tmp_path, monkeypatch):
    if "mnist" in config.name:
        monkeypatch.setenv("L2L_SCALE_DATA", str(Path(shared_data("mnist")).parent))
    monkeypatch.delenv("L2L_SCALE_RUN_DIR", raising=False)
    fit = Fit(["-c", str(config), "--run_dir", str(tmp_path), *TINY])
    fit.train()
    assert fit.trainer.global_step == 2
    assert (tmp_path / "rule.safetensors").is_file()
    assert (tmp_path / "config.yaml").is_file()
    assert (tmp_path / "metrics.csv").is_file()
