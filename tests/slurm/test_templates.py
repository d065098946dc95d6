"""The job scripts on a real Slurm of two virtual nodes, with a stand-in for l2l-scale."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import ENDED, Cluster

pytestmark = pytest.mark.slurm

# Says who it is, and ends as $CODES says: the first start's code, the second's, …; RANK=CODE for one rank,
# which waits until all are there: when it ends, srun ends the others. The first start takes $SECONDS_TO_RUN.
STAND_IN = """#!/usr/bin/env bash
echo "rank $SLURM_PROCID of $SLURM_NTASKS, local $SLURM_LOCALID, node $SLURM_NODEID, job $SLURM_JOB_NAME," \\
    "per node $SLURM_NTASKS_PER_NODE, cpus ${SLURM_CPUS_PER_TASK:-1}, gpus ${CUDA_VISIBLE_DEVICES:-none}:" \\
    "$(printf '<%s>' "$@")"
trap 'sleep 1; echo "rank $SLURM_PROCID saved"; exit 143' TERM
((${SLURM_RESTART_COUNT:-0} > 0)) || for ((i = 0; i < ${SECONDS_TO_RUN:-0} * 10; i++)); do sleep 0.1; done
codes=(${CODES:-0})
code="${codes[${SLURM_RESTART_COUNT:-0}]:-0}"
if [[ "$code" == *=* ]]; then
    : >"$0.$SLURM_JOB_ID.$SLURM_PROCID"
    [[ "$SLURM_PROCID" == "${code%=*}" ]] || sleep 60
    for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
        until [[ -e "$0.$SLURM_JOB_ID.$rank" ]]; do sleep 0.1; done
    done
fi
exit "${code#*=}"
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("stand_in") / "l2l-scale"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def submit(cluster: Cluster, stand_in: str, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits a template with the stand-in; arguments of sbatch, the template's name, its arguments."""
    jobs = []

    def one(*arguments: str, **variables: str) -> str:
        arguments = tuple(f"slurm/{one}" if one.endswith(".sbatch") else one for one in arguments)
        output = f"--output={tmp_path}/%j.log"
        jobs.append(cluster.submit(output, *arguments, **{"L2L_SCALE": stand_in, **variables}))
        return jobs[-1]

    yield one
    for job in jobs:
        if cluster.state(job) not in ENDED:
            cluster.cancel(job)


def ended(cluster: Cluster, job: str) -> tuple[str, int, int]:
    """State, exit code and restarts of a job, as soon as it ends."""
    return cluster.wait_for(job, ENDED, 30), cluster.exit_code(job), cluster.restarts(job)


def said(cluster: Cluster, job: str) -> list[str]:
    """What the ranks of a job said at their start, in order."""
    return sorted(line for line in cluster.log(job).splitlines() if " of " in line and line[:5] == "rank ")


def test_two_nodes_get_their_ranks_and_the_arguments(cluster, submit):
    size = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
    job = submit(*size, "train.sbatch", "-c", "a.yaml", "--run_dir", "runs/with space")
    assert ended(cluster, job) == ("COMPLETED", 0, 0)
    arguments = (
        "<fit><-c><a.yaml><--run_dir><runs/with space><--ckpt_path><last>"
        "<--trainer.num_nodes><2><--trainer.devices><1>"
    )
    assert said(cluster, job) == [
        f"rank 0 of 2, local 0, node 0, job l2l-scale, per node 1, cpus 2, gpus none: {arguments}",
        f"rank 1 of 2, local 0, node 1, job l2l-scale, per node 1, cpus 2, gpus none: {arguments}",
    ]


@pytest.mark.parametrize("request_gpus", ["--gpus-per-node=2", "--gpus-per-task=1", "--gres=gpu:2"])
def test_every_process_sees_the_gpus_of_its_node(cluster, submit, request_gpus):
    if not cluster.has_gpus:
        pytest.skip("device files cannot be made here")
    job = submit("--nodes=2", "--ntasks-per-node=2", request_gpus, "train.sbatch", "-c", "a")
    assert ended(cluster, job) == ("COMPLETED", 0, 0)
    lines = said(cluster, job)
    assert [line.split(",")[1] for line in lines] == [" local 0", " local 1"] * 2
    assert all("gpus 0,1:" in line and "<--trainer.devices><2>" in line for line in lines)


def test_gpus_without_cores_for_their_processes_are_refused(cluster, submit):
    if not cluster.has_gpus:
        pytest.skip("device files cannot be made here")
    job = submit("--gpus-per-node=2", "train.sbatch", "-c", "a")
    assert ended(cluster, job) == ("FAILED", 2, 0)
    assert "give sbatch --ntasks-per-node 2" in cluster.log(job)


@pytest.mark.parametrize("code", [2, 130])
def test_what_must_not_be_tried_again_is_not(cluster, submit, code):
    job = submit("train.sbatch", "-c", "a", CODES=str(code))
    assert ended(cluster, job) == ("FAILED", code, 0)
    assert "queue" not in cluster.log(job)


def test_a_job_of_which_a_process_was_killed_starts_again(cluster, submit, tmp_path):
    job = submit(
        "--nodes=2", "--ntasks-per-node=1", "train.sbatch", "--run_dir", str(tmp_path), CODES="1=137 0"
    )
    assert ended(cluster, job) == ("COMPLETED", 0, 1)
    # 143 where srun ended the other process first, which may not even have said who it is
    first, second = re.split(rf"job {job} ended with (?:137|143); back into the queue", cluster.log(job))
    assert "rank 1 of 2" in first
    assert "rank 0 of 2" in second
    assert "rank 1 of 2" in second


def test_a_job_that_fails_again_and_again_is_given_up(cluster, submit, tmp_path):
    run = ("train.sbatch", "-c", "a", "--run_dir", "elsewhere", f"--run_dir={tmp_path}")
    job = submit(*run, CODES="1 1", L2L_SCALE_MAX_RESTARTS="1")
    assert ended(cluster, job) == ("FAILED", 1, 1)
    assert "was started again 1 times already; giving up" in cluster.log(job)
    assert not (tmp_path / ".failures").exists()


def test_only_failures_in_a_row_count(cluster, submit, tmp_path):
    run = ("train.sbatch", "-c", "a", "--run_dir", str(tmp_path))
    job = submit(*run, CODES="1 75 1 0", L2L_SCALE_MAX_RESTARTS="1")
    assert ended(cluster, job) == ("COMPLETED", 0, 3)  # 75 is queued again though the stand-in did not
    assert not (tmp_path / ".failures").exists()


@pytest.mark.parametrize("argument", ["--ckpt_path=x", "--trainer.devices", "--overwrite"])
def test_what_the_script_decides_cannot_be_given(cluster, submit, argument):
    job = submit("train.sbatch", "-c", "a", argument, "1")
    assert ended(cluster, job) == ("FAILED", 2, 0)
    assert f"error: {argument} must be left out" in cluster.log(job)


def test_a_mistake_that_one_rank_finds_is_not_hidden_by_those_that_srun_ends(cluster, submit):
    job = submit("--nodes=2", "--ntasks-per-node=1", "train.sbatch", "-c", "a", CODES="0=2")
    state, code, restarts = ended(cluster, job)
    assert (state, restarts) == ("FAILED", 0)
    assert code == 2 or "may not be requeued" in cluster.log(job)


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, submit):
    job = submit("--nodes=2", "--ntasks-per-node=1", "train.sbatch", "-c", "a", SECONDS_TO_RUN="60")
    cluster.wait_for_text(job, "rank 1 of 2", 20)
    cluster.cancel(job)
    assert ended(cluster, job)[0] == "CANCELLED"
    for rank in (0, 1):
        cluster.wait_for_text(job, f"rank {rank} saved", 20)
    cluster.wait_for_text(job, "Slurm ends it", 20)
    assert cluster.restarts(job) == 0


def test_a_requeued_job_saves_first_and_appends_to_its_log(cluster, submit):
    job = submit("train.sbatch", "-c", "a", SECONDS_TO_RUN="60")
    cluster.wait_for_text(job, "rank 0 of 1", 20)
    cluster.requeue(job)
    cluster.wait_for_text(job, "rank 0 saved", 20)
    assert ended(cluster, job) == ("COMPLETED", 0, 1)
    assert len(said(cluster, job)) == 2


def test_sweep_over_seeds_has_a_folder_each_and_requeues_one_task_only(cluster, submit, tmp_path):
    arguments = ("sweep.sbatch", "-c", "a", "--run_dir", str(tmp_path / "x"))
    array = submit("--array=3,5", *arguments, CODES="137 0", SECONDS_TO_RUN="1")
    for seed in (3, 5):
        assert ended(cluster, f"{array}_{seed}") == ("COMPLETED", 0, 1)
        own = f"<--run_dir><{tmp_path}/x-{seed}><--seed_everything><{seed}><--ckpt_path><last>"
        assert [own in line for line in said(cluster, f"{array}_{seed}")] == [True, True]


def test_sweep_over_the_lines_of_a_file(cluster, submit, tmp_path):
    file = tmp_path / "sweep.txt"
    file.write_text("--data.slots 4 --a 'b c'\n--data.slots 8\n")
    array = submit("--array=0-1", "sweep.sbatch", "--run_dir=runs/x", L2L_SCALE_SWEEP=str(file))
    for task, own in enumerate(("<--data.slots><4><--a><b c>", "<--data.slots><8>")):
        assert ended(cluster, f"{array}_{task}") == ("COMPLETED", 0, 0)
        (line,) = said(cluster, f"{array}_{task}")
        assert f"<fit><--run_dir=runs/x-{task}>{own}<--ckpt_path>" in line


def test_evaluation_is_one_process_with_its_cores(cluster, submit):
    job = submit("--cpus-per-task=3", "evaluate.sbatch", "-c", "runs/x/config.yaml")
    assert ended(cluster, job) == ("COMPLETED", 0, 0)
    (line,) = said(cluster, job)
    assert line.startswith("rank 0 of 1")
    assert "cpus 3" in line
    assert line.endswith("<evaluate><-c><runs/x/config.yaml>")


def test_the_script_works_inside_salloc(cluster, stand_in, tmp_path):
    gpus = ["--gpus-per-node=1"] if cluster.has_gpus else []
    script = f"bash slurm/train.sbatch -c a --run_dir {tmp_path}; echo ended with $?"
    command = ["salloc", "-N2", *gpus, "bash", "-c", script]
    said = cluster.call(*command, L2L_SCALE=stand_in, CODES="0=75")
    seen = "0" if gpus else "none"
    assert len(re.findall(rf"rank [01] of 2, local 0, node [01], job l2l-scale, .*gpus {seen}:", said)) == 2
    assert re.search(r"^ended with (75|137|143)$", said, re.MULTILINE)  # 75, or of the rank that srun ended
    assert "Traceback" not in said


RAY = """
import os, sys
import ray

def value(name):
    return sys.argv[sys.argv.index(name) + 1]

@ray.remote
def where():
    return os.environ["SLURMD_NODENAME"]

ray.init(address=value("--data.pool.ray_address"), log_to_driver=False, logging_level="ERROR")
found = set(ray.get([where.remote() for _ in range(2)]))
print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
print("rank", os.environ["SLURM_PROCID"], "samples on", *found, "with", value("--data.pool.num_actors"))
"""


def test_nodes_that_only_sample_join_the_rays_of_those_that_train(cluster, submit, tmp_path):
    (tmp_path / "sampling.py").write_text(RAY)
    gpus = ("--gpus-per-node=2",) if cluster.has_gpus else ()
    training = (f"--nodelist={cluster.nodes[0]}", "--ntasks-per-node=2", *gpus)
    sampling = (f"--nodelist={cluster.nodes[1]}", "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=4")
    command = f"{sys.executable} {tmp_path / 'sampling.py'}"
    job = submit(*training, ":", *sampling, "train.sbatch", "-c", "a", L2L_SCALE=command)
    assert cluster.wait_for(job, ENDED, 90) == "COMPLETED", cluster.log(job)
    for rank in (0, 1):
        assert f"rank {rank} samples on {cluster.nodes[1]} with 2" in cluster.log(job)
    assert "gpus 0,1" in cluster.log(job) or not gpus
    assert "TOKEN" not in cluster.log(job)
