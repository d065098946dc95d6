"""The command line as a user meets it; errors are one clear message, never a traceback."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l2l_scale.cli.main import COMMANDS, main
from l2l_scale.cli.run_folder import RUN_DIR_VARIABLE, choose_folder, occupied
from l2l_scale.run_record import read_record
from l2l_scale.training.run_state import write_record

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
BASE = ["--model.rule=CoordinatewiseLSTM", "--data.family=Quadratic"]
IMAGES = ["--data.family=ImageClassifier"]
WEIGHTS = [
    *("--model.estimator=TruncatedBPTT", "--model.estimator.meta_loss=SumLoss"),
    "--model.estimator.meta_loss.weights=[1,2,3]",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of the smoke config."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
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
        (["fit", *BASE, "--trainer.logger=WandbRum"], "'WandbRun'"),
        (["fit", *BASE, "--trainer.logger=WandbRun", "--trainer.logger.projct=x"], "'project'"),
        (["fit", *BASE, "--trainer.logger=WandbRun", "--trainer.logger.init_timeout=0"], "init_timeout (0"),
        (["fit", *BASE, "--trainer.callbacks+=ValidationCurves", "--trainer.callbacks.every=0"], "every (0)"),
        (["fit", "-c", "no.yaml"], "File does not exist"),
        (["fit", *BASE, "--ckpt_path=no.ckpt"], "there is no such checkpoint"),
        (["fit", *BASE, "--trainer.max_steps=-1"], "trainer.max_steps (-1) must be > 0"),
        (["fit", *BASE, "--trainer.max_steps=150"], "must be a multiple of data.windows_per_epoch (100)"),
        (
            ["fit", *BASE, "--trainer.precision=16-mixed"],
            "32-true, 64-true, bf16-mixed: inner gradients",
        ),
        (["fit", *BASE, "--ckpt_path=last", "--overwrite=true"], "give one of them"),
        (["fit", BASE[0], *IMAGES, "--data.family.dataset=./nosuch"], "nosuch"),
        (["fit", *BASE, *WEIGHTS], "weights (3 numbers) must have one number per inner step"),
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


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the run, to be changed."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    text = (trained / "config.yaml").read_text()
    (tmp_path / "copy" / "config.yaml").write_text(text.replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_run_can_be_resumed_to_more_meta_steps_and_keeps_its_metrics(copied, capsys):
    before = (copied / "metrics.csv").read_bytes()
    config = str(copied / "config.yaml")
    main(["fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "75"])
    assert "(75 meta-steps)" in capsys.readouterr().out
    assert (copied / "metrics-1.csv").read_bytes() == before
    assert "\n60," in (copied / "metrics.csv").read_text().replace("2,60", "60")


def test_run_that_was_killed_after_its_last_checkpoint_is_finished_by_resuming(copied, trained, capsys):
    write_record(copied, {**read_record(copied), "state": "running"}, durable=False)
    (copied / "rule.safetensors").unlink()
    main(["fit", "-c", str(copied / "config.yaml"), "--run_dir", str(copied), "--ckpt_path", "last"])
    assert read_record(copied)["state"] == "finished"
    assert read_record(copied)["best"] == read_record(trained)["best"]
    for name in ("rule.safetensors", "metrics.csv"):
        assert (copied / name).read_bytes() == (trained / name).read_bytes()
    assert not (copied / "metrics-1.csv").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--data.slots", "8"], "data.slots is 16 there and 8 here"),
        (["--data.family.dimension", "2"], "data.family is"),
        (["--data.horizon", "40"], "data.horizon is 20 there and 40 here"),
        (["--seed_everything", "3"], "data.seed is 0 there and 3 here"),
        (["--model.rule.hidden_size", "9"], "rule.init_args.hidden_size is 8 there and 9 here"),
    ],
)
def test_resuming_another_run_is_refused_and_changes_nothing(copied, change, says, capsys):
    before = files_of(copied)
    options = ["--ckpt_path", "last", "--trainer.max_steps", "75", *change]
    assert says in fails(["fit", "-c", str(copied / "config.yaml"), *options], capsys)
    kept = files_of(copied)
    assert kept.pop(Path("metrics-1.csv"), None) in (None, before[Path("metrics.csv")])
    before.pop(Path("metrics.csv"))
    kept.pop(Path("metrics.csv"), None)
    assert kept == before


def test_config_of_one_run_starts_another_without_touching_the_first(trained, tmp_path):
    before = files_of(trained)
    for name in ("a", "b"):  # two in one process: the first one's folder must not leak into the second
        main(["fit", "-c", str(trained / "config.yaml"), "--run_dir", str(tmp_path / name)])
        assert (tmp_path / name / "checkpoints" / "last" / "manifest.json").is_file()
        assert (tmp_path / name / "rule.safetensors").read_bytes() == before[Path("rule.safetensors")]
    assert files_of(trained) == before


def test_overwrite_deletes_nothing_before_the_new_run_starts(copied, capsys):
    checkpoints = files_of(copied / "checkpoints")
    options = ["--overwrite", "true", "--model.learning_rate=-1"]
    fails(["fit", "-c", str(copied / "config.yaml"), *options], capsys)
    assert files_of(copied / "checkpoints") == checkpoints


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(copied):
    (copied / "thesis.txt").write_text("mine")
    main(["fit", "-c", str(copied / "config.yaml"), "--overwrite", "true", "--trainer.max_steps", "25"])
    assert (copied / "thesis.txt").read_text() == "mine"
    assert not (copied / "metrics-1.csv").exists()


@pytest.mark.slow
def test_interrupt_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "l2l_scale", "fit", "-c", SMOKE, "--run_dir", str(tmp_path / "run")]
    options = ["--trainer.max_steps", "1000000", "--trainer.enable_progress_bar", "false"]
    options += ["--checkpoint.every_n_meta_steps", "10"]
    # What runs in the background of a shell inherits that Ctrl-C is ignored; this process must not.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, preexec_fn=heed
    ) as process:
        for line in process.stdout:
            if "run folder" in line:
                break
        while not (tmp_path / "run" / "checkpoints" / "last").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "--ckpt_path last" in rest


def test_damaged_checkpoint_and_rule_are_named(trained, tmp_path, capsys):
    checkpoint, rule = tmp_path / "x", tmp_path / "x.safetensors"
    shutil.copytree(trained / "checkpoints" / "last", checkpoint)
    (checkpoint / "training.pt").write_bytes((checkpoint / "training.pt").read_bytes()[:1000])
    rule.write_bytes((trained / "rule.safetensors").read_bytes()[:1000])
    assert "x/training.pt is damaged" in fails(["export", str(checkpoint)], capsys)
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
    assert report["version"] == 3


def test_evaluate_takes_a_checkpoint_with_the_same_result_as_its_exported_rule(trained, tmp_path):
    reports, checkpoint, exported = [], trained / "checkpoints" / "last", tmp_path / "exported.safetensors"
    main(["export", str(checkpoint), "--out", str(exported)])
    for path in (exported, checkpoint):
        out = tmp_path / path.stem
        main(["evaluate", "-c", SMOKE, "--rule", str(path), "--out", str(out)])
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


def test_export_takes_its_options_from_a_file_and_prints_them(trained, tmp_path, capsys):
    out = tmp_path / "rule.safetensors"
    (tmp_path / "export.yaml").write_text(f"checkpoint: {trained}\nout: {out}\n")
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(trained), "--out", str(out), "--print_config"])
    assert exit_.value.code == 0
    assert f"out: {out}" in capsys.readouterr().out
    main(["export", "-c", str(tmp_path / "export.yaml")])
    assert out.read_bytes() == (trained / "rule.safetensors").read_bytes()


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


@pytest.mark.slow
def test_two_processes_train_like_one_and_one_goes_on_where_two_stopped(tmp_path):
    def rows(name):
        with (tmp_path / name / "metrics.csv").open() as file:
            return [float(row["valid/sum"]) for row in csv.DictReader(file) if row["valid/sum"]]

    def fit(name, *options):
        return ["fit", "-c", SMOKE, "--run_dir", str(tmp_path / name), *options]

    two = fit("two", "-c", str(ROOT / "configs" / "overlays" / "cpu2.yaml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "l2l_scale", *two], check=True, timeout=120, env=environment)
    main(fit("one"))
    assert rows("two") == pytest.approx(rows("one"), rel=1e-5)
    for name in ("one", "two"):
        main(fit(name, "--ckpt_path", "last", "--trainer.max_steps", "75"))
    assert len(rows("two")) == 1
    assert rows("two") == pytest.approx(rows("one"), rel=1e-5)


def test_fit_says_how_a_shared_memory_is_stored(tmp_path, capsys):
    small = [
        "--trainer.max_steps",
        "2",
        "--data.windows_per_epoch",
        "2",
        "--trainer.enable_progress_bar=false",
    ]
    rule = ["--model.rule", "SharedMemory", "--run_dir", str(tmp_path / "run")]
    main(["fit", "-c", SMOKE, *rule, *small])
    said = capsys.readouterr().out
    assert "dense shared memory, 3 × 3" in said
    assert "fused LSTM layers" in said or "eager" in said


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_processes_that_others_started_must_be_told_the_folder(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    for name, value in zip(names, ("1", "2"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"run_dir must be given .* starts the 2 processes"):
        choose_folder(None, "run", checkpoint=None, overwrite=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()  # rank 0's, which may be quicker
    assert choose_folder("run", "run", checkpoint=None, overwrite=False) == Path("run")
    monkeypatch.setenv(names[0], "0")
    with pytest.raises(ValueError, match="not empty; resume"):
        choose_folder("run", "run", checkpoint=None, overwrite=False)
    with pytest.raises(ValueError, match=r"ckpt_path \(elsewhere\) is none of its checkpoints; resume"):
        choose_folder("run", "run", checkpoint="elsewhere", overwrite=False)


def test_two_processes_do_not_train_in_one_folder(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("l2l_scale.cli.run_folder.PATIENCE", 0.1)
    with occupied(tmp_path / "run"):
        assert "run_dir" in fails(
            ["fit", "-c", SMOKE, "--run_dir", str(tmp_path / "run"), "--ckpt_path=last"], capsys, 1
        )
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists()


def test_last_is_a_fresh_start_where_there_is_nothing_yet(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps", "25", "--ckpt_path", "last"]
    main(["fit", "-c", SMOKE, *short])
    assert "(25 meta-steps)" in capsys.readouterr().out
    main(
        ["fit", "-c", SMOKE, "--trainer.max_steps", "50", "--ckpt_path", "last"]
    )  # the same folder, without a number
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["smoke"]
    steps = sorted(path.name for path in (tmp_path / "runs/smoke/checkpoints").iterdir())
    assert steps == ["last", "step-00000025", "step-00000050"]


def test_without_checkpoints_a_run_trains_and_says_so(tmp_path, capsys):
    main(["fit", "-c", SMOKE, "--run_dir", str(tmp_path / "run"), "--trainer.enable_checkpointing", "false"])
    assert "no checkpoint was written" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"


def test_a_checkpoint_of_one_run_does_not_go_into_the_folder_of_another(trained, copied, tmp_path, capsys):
    before = files_of(copied)
    options = ["--ckpt_path", str(trained / "checkpoints" / "last"), "--trainer.max_steps", "75"]
    error = fails(["fit", "-c", SMOKE, "--run_dir", str(copied), *options], capsys)
    assert "is not empty" in error
    assert files_of(copied) == before
    main(["fit", "-c", SMOKE, "--run_dir", str(tmp_path / "new"), *options])
    assert (tmp_path / "new" / "rule.safetensors").is_file()


def test_a_fault_after_training_began_is_no_mistake_of_the_user(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.log_metrics", full)
    assert "No space left" in fails(["fit", "-c", SMOKE, "--run_dir", str(tmp_path / "run")], capsys, code=1)
