"""``l2l-scale memory``, and the check before ``fit``."""

import json
from pathlib import Path

import pytest

from l2l_scale.cli.main import main
from l2l_scale.training.memory import prediction as memory_file

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


@pytest.fixture
def little(monkeypatch):
    """A host with next to no memory."""
    monkeypatch.setattr(memory_file, "host_available", lambda: 1_000_000)


def fails(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_table_shows_the_parts_and_what_is_there(capsys):
    main(["memory", "-c", SMOKE])
    shown = capsys.readouterr().out
    for part in ("process itself", "φ and Adam", "slots", "window", "total", "available", "host"):
        assert part in shown
    assert "B per coordinate and inner step" in shown


def test_json_adds_up(capsys):
    main(["memory", "-c", SMOKE, "--json", "--trainer.devices=2", "--trainer.num_nodes=4"])
    found = json.loads(capsys.readouterr().out)
    host = found["host"]
    assert host["ranks"] == 2
    assert host["total"] == 2 * sum(host["parts"].values())
    assert found["device"] is None
    assert found["fits"] is (host["total"] <= host["available"])


def test_gpu_need_not_be_here(capsys):
    main(["memory", "-c", SMOKE, "--trainer.accelerator=gpu", "--trainer.devices=[0,1]"])
    shown = capsys.readouterr().out
    assert "device" in shown
    assert "2 × =" in shown  # two ranks on the host


@pytest.mark.parametrize("command", ["memory", "fit"])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    command, little, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    error = fails([command, "-c", SMOKE], capsys)
    assert "of the host's memory, 1 MB are available" in error
    assert list(tmp_path.iterdir()) == []


def test_check_can_be_left_out_and_is_not_kept_in_the_run(little, tmp_path, capsys):
    folder = tmp_path / "run"
    quiet = "--trainer.enable_progress_bar=false"
    main(["fit", "-c", SMOKE, "--run_dir", str(folder), "--check_memory=false", quiet])
    assert (folder / "rule.safetensors").is_file()
    assert "check_memory" not in (folder / "config.yaml").read_text()
    assert "would need" in fails(["memory", "-c", str(folder / "config.yaml")], capsys)
