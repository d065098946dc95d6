"""Trainings in jobs that are interrupted in every way that Slurm knows; each must end as if nothing had been.

Two ranks on two virtual nodes. What comes out is compared bit for bit with that of a job that nobody touched.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from cluster import ENDED, ROOT, Cluster

from l2l_scale.training.checkpoints.folder import TRAINING, read_tensors
from l2l_scale.tree import tree_leaves

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SIZE = ("--nodes=2", "--ntasks-per-node=1")
RUN = (
    *("-c", "configs/smoke.yaml", "--trainer.max_steps", "500", "--data.windows_per_epoch", "100"),
    *("--trainer.log_every_n_steps", "20", "--trainer.enable_progress_bar", "false"),
)
COMMAND = f"{sys.executable} -m l2l_scale"


@pytest.fixture
def train(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits a training into tmp_path/run; arguments are of sbatch."""
    jobs = []

    def one(*arguments: str, name: str = "run", options: tuple[str, ...] = RUN) -> str:
        script = ("slurm/train.sbatch", *options, "--run_dir", str(tmp_path / name))
        jobs.append(cluster.submit(f"--output={tmp_path}/%j.log", *arguments, *script, L2L_SCALE=COMMAND))
        return jobs[-1]

    yield one
    for job in jobs:
        if cluster.state(job) not in ENDED:
            cluster.cancel(job)


def rows(folder: Path) -> list[dict[str, str]]:
    """What was logged, by all starts, oldest first."""
    found: list[dict[str, str]] = []
    for path in [*sorted(folder.glob("metrics-*.csv")), folder / "metrics.csv"]:
        if path.exists():
            with path.open() as file:
                found += list(csv.DictReader(file))
    return found


Outcome: TypeAlias = tuple[bytes, str, list[Any]]


def outcome(folder: Path) -> Outcome:
    """The exported rule, the last validation; and φ, Adam's state and all that is in flight at the end."""
    validated = [row["valid/sum"] for row in rows(folder) if row.get("valid/sum")][-1]
    last = folder / "checkpoints" / "last"
    training = read_tensors(last / TRAINING)
    slots = [read_tensors(path) for path in sorted(last.glob("slots-*"))]
    assert len(slots) == 2
    leaves = tree_leaves([training["state_dict"], training["optimizer_states"], slots])
    plain = [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    assert len(plain) > 20
    return (folder / "rule.safetensors").read_bytes(), validated, plain


def wait_until_it_trains(cluster: Cluster, job: str, folder: Path, logged: int = 5) -> None:
    """Until some meta-steps were logged."""
    deadline = time.monotonic() + 90
    while len(rows(folder)) < logged:
        late = time.monotonic() > deadline or cluster.state(job) in ENDED
        assert not late, f"job {job} does not train; its log:\n{cluster.log(job)}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The outcome of a job that nobody interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    script = ("slurm/train.sbatch", *RUN, "--run_dir", str(folder / "run"))
    job = cluster.submit(f"--output={folder}/%j.log", *SIZE, *script, L2L_SCALE=COMMAND)
    cluster.wait_for(job, "COMPLETED", 120)
    assert cluster.restarts(job) == 0
    return outcome(folder / "run")


def usr1(cluster: Cluster, job: str) -> None:
    cluster.signal(job, "USR1")


def requeue(cluster: Cluster, job: str) -> None:
    cluster.requeue(job)


def preemption(cluster: Cluster, job: str) -> None:
    urgent = cluster.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    cluster.wait_for(urgent, "COMPLETED", 60)


def kill_of_a_process(cluster: Cluster, job: str) -> None:
    cluster.kill(job, rank=1)


@pytest.mark.parametrize(
    ("interrupt", "saves"), [(usr1, True), (requeue, True), (preemption, True), (kill_of_a_process, False)]
)
def test_interrupted_job_comes_back_and_ends_as_if_nothing_had_been(
    cluster, train, undisturbed, tmp_path, interrupt, saves
):
    job = train(*SIZE)
    wait_until_it_trains(cluster, job, tmp_path / "run")
    interrupt(cluster, job)
    cluster.wait_for(job, "COMPLETED", 150)
    log = cluster.log(job)
    assert cluster.restarts(job) == 1, log
    assert ("saved as" in log) == saves, log
    assert outcome(tmp_path / "run") == undisturbed


def test_time_limit(cluster, train, tmp_path):
    """A minute is the shortest that Slurm knows. The job is saved before, and queued again.

    USR1 may come up to a minute early; whichever comes first, it or the run's own look at the limit.
    """
    endless = (*RUN, "--trainer.max_steps", "1000000")
    job = train(*SIZE, "--time=1", "--signal=USR1@10", options=endless)
    log = cluster.wait_for_text(job, "saved as", 90)
    cluster.wait_for(job, "PENDING", 30)
    assert cluster.restarts(job) == 1
    assert re.search(r"stopped by (the time limit|SIGUSR1); saved as", log)
    assert f"queueing job {job} again" in cluster.log(job)


def test_cancelled_training_is_saved_and_does_not_come_back(cluster, train, tmp_path):
    job = train(*SIZE, options=(*RUN, "--trainer.max_steps", "1000000"))
    wait_until_it_trains(cluster, job, tmp_path / "run")
    cluster.cancel(job)
    cluster.wait_for(job, "CANCELLED", 30)
    log = cluster.wait_for_text(job, "was not queued again", 30)
    assert "saved as" in log
    assert cluster.restarts(job) == 0


def test_mistake_of_the_user_is_not_tried_again(cluster, train):
    job = train(*SIZE, options=(*RUN, "--data.slotz", "3"))
    cluster.wait_for(job, "FAILED", 60)
    assert "unrecognized arguments: --data.slotz" in cluster.log(job)
    assert cluster.exit_code(job) in (2, 143)  # 143 where srun ended the other rank first
    assert cluster.restarts(job) == 0


def test_two_jobs_share_a_node(cluster, train, tmp_path):
    """Each with two ranks on it, which meet at a port of their own."""
    size = (f"--nodelist={cluster.nodes[0]}", "--ntasks-per-node=2")
    short = (*RUN, "--trainer.max_steps", "100")
    jobs = [train(*size, name=name, options=short) for name in ("a", "b")]
    for job in jobs:
        cluster.wait_for(job, "COMPLETED", 120)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_srun_inside_salloc(cluster, tmp_path):
    command = [
        *COMMAND.split(),
        "fit",
        *RUN,
        "--trainer.max_steps",
        "100",
        "--run_dir",
        str(tmp_path / "run"),
    ]
    ranks = ["--trainer.num_nodes", "2"]
    said = cluster.call("salloc", *SIZE, "srun", *command, *ranks)
    assert "on 2 ranks" in said
    assert (tmp_path / "run/rule.safetensors").is_file()


def test_sampling_nodes_draw_for_the_ranks(cluster, train, tmp_path):
    training = (f"--nodelist={cluster.nodes[0]}", "--ntasks-per-node=2")
    sampling = (f"--nodelist={cluster.nodes[1]}", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2")
    job = train(*training, ":", *sampling, options=(*RUN, "--trainer.max_steps", "100"))
    cluster.wait_for(job, "COMPLETED", 150)
    assert "on 2 ranks" in cluster.log(job)


def test_submitted_job_runs_the_code_that_it_was_submitted_with(cluster, tmp_path):
    """By the command, from a folder with a family of the user's own, which is changed at once."""
    source = (
        "from l2l_scale.tasks import Quadratic, TaskFamily\n"
        "def mine() -> TaskFamily:\n    return Quadratic(dimension=3)\n"
    )
    (tmp_path / "mine.py").write_text(source)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    arguments = ["slurm", str(ROOT / "configs/smoke.yaml"), "--run_dir", "run", "--data.family", "mine.mine"]
    done = subprocess.run(
        [sys.executable, "-m", "l2l_scale", *arguments, "--nodes", "2"],
        cwd=tmp_path,
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "mine.py").write_text("raise RuntimeError('this is not what was submitted')\n")
    job = done.stdout.split()[1]
    cluster.wait_for(job, "COMPLETED", 90)
    assert (tmp_path / "run/rule.safetensors").is_file()
    assert str(tmp_path / f"run/slurm-{job}.log") in done.stdout
