"""Every command and every piece of Python in the README works as it stands there (with smaller numbers)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import shared_data

from l2l_scale.cli.main import main
from l2l_scale.tasks.hub import DATA_VARIABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if line.startswith("l2l-scale")
]
INLINE = re.findall(r"`(l2l-scale [^`…]+)`", README)
SCRIPTS = re.findall(
    r"^scripts/\w+", "\n".join(text for kind, text in BLOCKS if kind == "bash"), re.MULTILINE
)

SMALL = {
    "fit": ["--trainer.max_steps", "2", "--data.slots", "2", "--data.windows_per_epoch", "2"],
    "evaluate": [
        *("--evaluation.num_workers", "1"),  # workers of an earlier test would not find the files of this one
        *(
            "--evaluation.num_tasks",
            "4",
            "--evaluation.num_tuning_tasks",
            "4",
            "--evaluation.baselines",
            "[SGD]",
        ),
        *("--evaluation.num_shift_tasks", "4", "--evaluation.num_shift_tuning_tasks", "4"),
        *(
            "--evaluation.num_reference_tasks",
            "2",
            "--evaluation.inner_steps",
            "100",
            "--evaluation.cache",
            "false",
        ),
    ],
    "export": [],
}
SMALL["tune"] = SMALL["evaluate"]
SMALL["memory"] = SMALL["runs"] = SMALL["pretrained"] = []
SMALL["reproduce"] = [*SMALL["fit"], *SMALL["evaluate"], "--evaluation.horizons", "[100]"]
SMALL["diagnose"] = ["--tasks", "1"]
SMALL["slurm"] = ["--dry-run"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like a fresh clone, in which the README's examples run one after another."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "rates.txt").write_text("--model.learning_rate 0.001\n--data.slots 64\n")
    for _, text in BLOCKS:
        if found := re.match(r"# (\w+\.(py|yaml))\n", text):
            (folder / found[1]).write_text(text)
    yield folder
    for name in ("sines", "my_rule"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


def run(command: str) -> None:
    _, name, *arguments = shlex.split(command, comments=True)
    arguments = [name, *arguments, *SMALL[name]]
    if any("cpu2" in argument for argument in arguments):  # Lightning would start pytest once more
        subprocess.run([sys.executable, "-m", "l2l_scale", *arguments], check=True, timeout=300)
    else:
        main(arguments)


@pytest.mark.parametrize("command", COMMANDS + INLINE)
def test_command_runs(command, monkeypatch):
    if "mnist" in command:
        monkeypatch.setenv(DATA_VARIABLE, str(Path(shared_data("mnist")).parent))
    if "--ckpt_path last" in command:
        monkeypatch.setitem(SMALL, "fit", ["--trainer.max_steps", "4"])
    run(command)


def test_the_commands_are_found():
    assert [shlex.split(command)[1] for command in COMMANDS] == [
        *("pretrained", "reproduce", "fit", "evaluate", "diagnose", "tune", "export", "runs"),
        *("memory", "fit", "slurm", "slurm", "slurm", "fit", "diagnose", "evaluate"),
    ]
    assert any("--ckpt_path last" in command for command in INLINE)


def test_scripts_exist():
    assert SCRIPTS == ["scripts/quickstart", "scripts/test", "scripts/torture"]
    assert all(os.access(ROOT / script, os.X_OK) for script in SCRIPTS)


def test_python_runs(folder):
    """The blocks build on each other, as a reader would type them."""
    for name, config in (("quickstart", "configs/smoke.yaml"), ("sines", "sines.yaml")):
        run = folder / "runs" / name
        if not (run / "rule.safetensors").exists():
            main(["fit", "-c", config, "--run_dir", str(run), "--overwrite", "true", *SMALL["fit"]])
    source = "\n".join(text for kind, text in BLOCKS if kind == "python")
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_pictures_exist():
    assert all((ROOT / path).is_file() for path in re.findall(r"!\[.*?\]\(([^)]*)\)", README))


def test_table_of_configs_is_complete():
    table = README.split("| config |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `([\w/]+\.yaml)`", table, re.MULTILINE))
    folder = ROOT / "configs"
    every = [*folder.glob("*.yaml"), *folder.glob("paper/*.yaml")]
    assert listed == {path.relative_to(folder).as_posix() for path in every}


def test_table_of_overlays_is_complete():
    table = README.split("| overlay |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+\.yaml)`", table, re.MULTILINE))
    assert listed == {path.name for path in ROOT.glob("configs/overlays/*.yaml")}


def test_the_files_of_the_tutorial_are_all_written(folder):
    assert {path.name for path in folder.iterdir() if path.suffix in (".py", ".yaml")} == {
        *("sines.py", "my_rule.py", "sines.yaml"),
    }
