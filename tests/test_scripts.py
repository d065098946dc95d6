"""The scripts, with a stand-in for the environment's Python, and the pins."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
COMMANDS = [
    *("scripts/quickstart", "scripts/two_processes", "scripts/test", "scripts/benchmark"),
    *("scripts/benchmark_sampling", "scripts/benchmark_scaling", "scripts/benchmark_checkpoints"),
    *("scripts/torture", ".ci/run"),
]
SLURM = [f"slurm/{name}" for name in ("env.sh", "ray.sh", "train.sbatch", "sweep.sbatch", "evaluate.sbatch")]
PIN = re.compile(r'([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)(?:; (python_version (?:<|>=) "3\.\d+"))?')
# Installed unpinned on purpose: the installers, and the CUDA libraries that torch itself pins.
UNPINNED = re.compile(r"pip|setuptools|triton|(nvidia|cuda)-.*")

PYTEST = "-m pytest --numprocesses logical --maxprocesses 8 --dist loadfile"

# Stands in for .venv/bin/python: writes down how it was called, and fails where $FAIL matches.
STAND_IN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in $FAIL) exit 3 ;; esac
"""


def pins(python: str) -> dict[str, str]:
    """The pinned version of every package for a Python version."""
    found = {}
    for line in (ROOT / "scripts/constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = PIN.fullmatch(line)
        assert match, f"not of the form name==version[; python_version ...]: {line}"
        name, version, marker = match.groups()
        if marker is None or Marker(marker).evaluate({"python_version": python}):
            assert canonicalize_name(name) not in found, f"pinned twice for Python {python}: {name}"
            found[canonicalize_name(name)] = version
    return found


@pytest.mark.parametrize("script", [*COMMANDS, "scripts/environment.sh", *SLURM])
def test_script_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", COMMANDS)
def test_script_is_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_every_dependency_is_pinned_within_its_range(python: str) -> None:
    pinned = pins(python)
    for requirement in map(Requirement, requires("l2l_scale") or []):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version), (str(requirement), version)


def test_everything_that_the_dependencies_bring_along_is_pinned() -> None:
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    missing = {name for name in closure("l2l_scale", "dev") if not UNPINNED.fullmatch(name)} - set(pinned)
    assert missing == {"l2l-scale"}


def closure(name: str, extra: str, seen: set[str] | None = None) -> set[str]:
    """A distribution and all that it needs on this machine, by normalised name."""
    seen = set() if seen is None else seen
    seen.add(canonicalize_name(name))
    try:
        needed = [Requirement(line) for line in requires(name) or []]
    except PackageNotFoundError:  # of an extra that is not installed
        return seen
    for requirement in needed:
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if wanted and canonicalize_name(requirement.name) not in seen:
            for own in requirement.extras or {""}:
                closure(requirement.name, own, seen)
    return seen


def test_pins_are_sorted_and_name_no_place_of_this_machine() -> None:
    lines = [line for line in (ROOT / "scripts/constraints.txt").read_text().splitlines() if line[0] != "#"]
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert names == sorted(names)
    assert not any(sign in line for line in lines for sign in ("/", "@", "+"))


class Clone:
    """A copy of the scripts in a folder whose environment is a stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder.parent / "calls"
        for name in [*COMMANDS, "scripts/environment.sh", "scripts/constraints.txt", "pyproject.toml"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod((ROOT / name).stat().st_mode)
        self.python = folder / ".venv/bin/python"
        self.python.parent.mkdir(parents=True)
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.programs = folder.parent / "programs"
        self.programs.mkdir()
        self.add_program("slurmctld", "exit 0")  # else .ci/run would install Slurm on this machine

    def add_program(self, name: str, script: str) -> None:
        """Put a stand-in for a program before those of the system."""
        (self.programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.programs / name).chmod(0o755)

    def run(self, *command: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """Run a script from elsewhere; the result, and its calls of Python but for the look for pip."""
        self.calls.write_text("")
        path = f"{self.programs}:{variables.pop('PATH', os.environ['PATH'])}"
        environment = {**os.environ, "CALLS": str(self.calls), "FAIL": "", "PATH": path, **variables}
        script, *arguments = command
        result = subprocess.run(
            [self.folder / script, *arguments],
            cwd="/",
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )
        lines = self.calls.read_text().splitlines()
        return result, [line for line in lines if line != "-m pip --version"]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone with space")


def test_test_script_installs_once_and_passes_its_arguments_on(clone: Clone) -> None:
    _, first = clone.run("scripts/test", "-k", "quadratic")
    result, second = clone.run("scripts/test")
    assert first == [
        "-m pip install --editable .[dev] --constraint scripts/constraints.txt",
        f"{PYTEST} -k quadratic",
    ]
    assert second == [PYTEST]
    assert re.search(r"The tests took \d+ min \d\d s", result.stdout)


def test_environment_is_installed_anew_when_pins_change_or_the_clone_moves(clone: Clone) -> None:
    clone.run("scripts/test")
    with (clone.folder / "scripts/constraints.txt").open("a") as file:
        file.write("# changed\n")
    _, calls = clone.run("scripts/test")
    assert len(calls) == 2
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    _, calls = clone.run("scripts/test")
    assert len(calls) == 2


def test_failed_installation_stops_and_is_tried_again(clone: Clone) -> None:
    result, calls = clone.run("scripts/test", FAIL="*install*")
    assert result.returncode == 3
    assert len(calls) == 1
    _, calls = clone.run("scripts/test")
    assert calls[-1] == PYTEST
    assert len(calls) == 2


def test_failed_tests_fail_the_test_script_and_ci(clone: Clone) -> None:
    assert clone.run("scripts/test", FAIL="*pytest*")[0].returncode == 3
    assert clone.run(".ci/run", FAIL="*pytest*")[0].returncode == 3


def test_ci_checks_lint_format_types_and_tests_and_stops_at_the_first_failure(clone: Clone) -> None:
    _, calls = clone.run(".ci/run")
    triton = "-m pip install --quiet --no-deps triton==3.7.1"
    assert calls[1:] == ["-m ruff check", "-m ruff format --check", "-m mypy", triton, PYTEST]
    result, calls = clone.run(".ci/run", FAIL="*--check")
    assert result.returncode == 3
    assert calls[-1] == "-m ruff format --check"


@pytest.mark.parametrize(("ends", "said"), [(0, "== Slurm"), (100, "those tests are skipped")])
def test_ci_installs_slurm_where_it_is_missing_and_goes_on_without(
    clone: Clone, ends: int, said: str
) -> None:
    (clone.programs / "slurmctld").unlink()
    clone.add_program("id", "echo 0")
    clone.add_program("apt-get", f'echo "apt-get $*" >>"$CALLS"; [[ $1 == update ]] || exit {ends}')
    result, calls = clone.run(".ci/run", PATH="/usr/bin:/bin")  # slurmctld lies in an sbin
    assert calls[-3:] == [
        "apt-get update",
        "apt-get install -y --no-install-recommends slurm-wlm munge",
        PYTEST,
    ]
    assert result.returncode == 0
    assert said in result.stdout


def test_quickstart_trains_and_evaluates_the_same_rule_and_names_what_it_made(clone: Clone) -> None:
    result, calls = clone.run("scripts/quickstart")
    assert result.returncode == 0, result.stderr
    assert [call.split()[2] for call in calls] == ["install", "fit", "evaluate"]
    folder = re.search(r"--run_dir (\S+)", calls[1])[1]
    assert f"--rule {folder}/rule.safetensors" in calls[2]
    for made in ("evaluation/curves.png", "evaluation/report.md", "rule.safetensors"):
        assert f"{clone.folder}/{folder}/{made}" in result.stdout
    assert (ROOT / re.search(r"-c (\S+)", calls[1])[1]).is_file()


def test_two_processes_start_with_one_command_that_takes_arguments(clone: Clone) -> None:
    result, calls = clone.run("scripts/two_processes", "--trainer.max_steps", "200")
    assert result.returncode == 0, result.stderr
    assert [call.split()[2] for call in calls] == ["install", "fit"]
    assert calls[1].endswith(" --trainer.max_steps 200")
    configs = re.findall(r"-c (\S+)", calls[1])
    assert [(ROOT / config).is_file() for config in configs] == [True, True]
    assert "devices: 2" in (ROOT / configs[1]).read_text()
    folder = re.search(r"--run_dir (\S+)", calls[1])[1]
    assert f"{clone.folder}/{folder}/rule.safetensors" in result.stdout
    assert clone.run("scripts/two_processes", FAIL="*fit*")[0].returncode == 3


def test_torture_passes_its_arguments_on(clone: Clone) -> None:
    _, calls = clone.run("scripts/torture", "--kills", "3")
    assert calls[1:] == ["scripts/torturing --kills 3"]
    assert clone.run("scripts/torture", FAIL="*torturing*")[0].returncode == 3


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        ("exit 1", "Python 3.10 or later is needed"),
        ('case "$*" in *version_info*) ;; *) exit 1 ;; esac', "venv"),
    ],
    ids=["too old", "without venv"],
)
def test_unusable_python_is_refused_in_one_line(clone: Clone, stand_in: str, message: str) -> None:
    base = clone.folder / "python3"
    base.write_text(f"#!/usr/bin/env bash\n{stand_in}\n")
    base.chmod(0o755)
    clone.python.unlink()
    for script in ("scripts/quickstart", "scripts/test", ".ci/run"):
        result, _ = clone.run(script, PYTHON=str(base))
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
