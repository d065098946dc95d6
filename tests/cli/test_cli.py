"""The command line as a user meets it; errors are one clear message, never a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from l2l_scale.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
BASE = ["--model.rule=CoordinatewiseLSTM", "--data.family=Quadratic"]


@pytest.fixture(autouse=True)
def _no_run_folder(monkeypatch):
    monkeypatch.delenv("L2L_SCALE_RUN_DIR", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of the smoke config."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("L2L_SCALE_RUN_DIR", raising=False)
        main(["fit", "-c", SMOKE, "--run_dir", str(folder), "--trainer.enable_progress_bar=false"])
    return folder


def fails(arguments, capsys, code=2) -> str:
    """What a failing command says on stderr."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == code, error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fti"], "choose one of fit, evaluate, tune, export"),
        (["fit", *BASE, "--data.horizn=100"], "did you mean 'data.horizon'?"),
        (["fit", *BASE, "--data.horizon=abc"], "Expected a <class 'int'>. Got value: abc"),
        (["fit", *BASE, "--data.horizon=101"], "horizon (101) must be a multiple of window (20)"),
        (["fit", *BASE, "--data.family.dimensoin=3"], "did you mean 'dimension'?"),
        (["fit", *BASE, "--data.family.dimension=-1"], "dimension (-1) must be a whole number >= 1"),
        (["fit", *BASE, "--model.learning_rate=.nan"], "learning_rate (nan) must be a finite number > 0"),
        (["fit", "--model.rule=CoordinatewiseLSTN", "--data.family=Quadratic"], "'CoordinatewiseLSTM'"),
        (["fit", "--data.family=Quadratic"], "model.rule"),
        (["fit", "-c", "no.yaml"], "File does not exist"),
        (["fit", *BASE, "--ckpt_path=no.ckpt"], "there is no checkpoint no.ckpt"),
        (["fit", *BASE, "--run_dir=runs/no", "--ckpt_path=last"], "runs/no/checkpoints/last.ckpt"),
        (["fit", *BASE, "--trainer.max_steps=-1"], "trainer.max_steps (-1) must be > 0"),
        (["export", "no.ckpt"], "there is no checkpoint no.ckpt"),
        (["evaluate", "-c", SMOKE, "--rule=no.safetensors"], "no.safetensors"),
        (["evaluate", "-c", SMOKE, "--evaluation.num_tasks=-3"], "num_tasks (-3)"),
        (["evaluate", "-c", SMOKE, "--evaluation.baselines=[Adm]"], "Adam"),
    ],
)
def test_mistake_is_answered_by_one_clear_message(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(arguments, capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_unknown_key_in_a_file_names_the_nearest_one(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("trainer:\n  max_stesp: 3\n")
    assert "did you mean 'max_steps'?" in fails(["fit", "-c", str(tmp_path / "x.yaml")], capsys)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="horizon"):
        main(["fit", *BASE, "--data.horizon=101", "--debug"])


def test_folder_with_a_run_is_not_written_over_unasked(trained, capsys):
    error = fails(["fit", "-c", SMOKE, "--run_dir", str(trained)], capsys)
    assert "--ckpt_path last" in error
    assert "--overwrite true" in error


def test_finished_run_can_be_resumed_to_more_meta_steps(trained, capsys):
    config = str(trained / "config.yaml")
    main(["fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "60"])
    assert "(60 meta-steps)" in capsys.readouterr().out


def test_damaged_checkpoint_and_rule_are_named(trained, tmp_path, capsys):
    checkpoint, rule = tmp_path / "x.ckpt", tmp_path / "x.safetensors"
    checkpoint.write_bytes((trained / "checkpoints" / "best.ckpt").read_bytes()[:1000])
    rule.write_bytes((trained / "rule.safetensors").read_bytes()[:1000])
    assert "x.ckpt is not a readable checkpoint" in fails(["export", str(checkpoint)], capsys)
    assert "x.safetensors" in fails(["evaluate", "-c", SMOKE, "--rule", str(rule)], capsys)


def test_export_of_a_run_equals_what_fit_exported(trained, tmp_path, capsys):
    out = tmp_path / "again.safetensors"
    main(["export", str(trained), "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    assert out.read_bytes() == (trained / "rule.safetensors").read_bytes()


def test_evaluate_writes_report_table_and_picture(trained, tmp_path, capsys):
    rule = str(trained / "rule.safetensors")
    main(["evaluate", "-c", SMOKE, "--rule", rule, "--out", str(tmp_path)])
    assert "Adam" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.md").is_file()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["version"] == 1


def test_evaluate_takes_a_checkpoint_with_the_same_result_as_its_exported_rule(trained, tmp_path):
    reports = []
    for name in ("rule.safetensors", "checkpoints/best.ckpt"):
        out = tmp_path / Path(name).stem
        main(["evaluate", "-c", SMOKE, "--rule", str(trained / name), "--out", str(out)])
        tests = json.loads((out / "report.json").read_text())["tests"]
        reports.append(tests["held-out"]["optimizers"]["learned"])
    assert reports[0] == reports[1]


def test_tune_shows_what_was_chosen(tmp_path, capsys):
    main(["tune", "-c", SMOKE, "--out", str(tmp_path)])
    assert "learning_rate" in capsys.readouterr().out
    assert (tmp_path / "tuning.json").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("command", ["fit", "evaluate", "tune"])
def test_print_config_prints_a_config_that_parses_again(command, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main([command, "-c", SMOKE, "--print_config"])
    assert exit_.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit) as exit_:
        main([command, "-c", str(tmp_path / "printed.yaml"), "--print_config"])
    assert exit_.value.code == 0


def test_overlay_wins_over_the_file_before_it(tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("data:\n  slots: 77\n")
    with pytest.raises(SystemExit):
        main(["fit", "-c", SMOKE, "-c", str(tmp_path / "more.yaml"), "--print_config"])
    assert "slots: 77" in capsys.readouterr().out


def test_module_entry_answers_quickly_and_lists_commands():
    done = subprocess.run(
        [sys.executable, "-m", "l2l_scale", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in done.stdout for command in COMMANDS)
