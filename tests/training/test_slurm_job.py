"""What a process knows of its Slurm job, with a stand-in for scontrol; tests/slurm has a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from l2l_scale.training import slurm_job
from l2l_scale.training.slurm_job import SlurmJob

# As Slurm 22.05 shows a job.
SHOWN = """JobId=12 JobName=a JobState=CANCELLED EndTime=5 Requeue=0
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:05 TimeLimit=08:00:00 TimeMin=N/A
   StartTime=1700000000 EndTime=1700028800 Deadline=N/A
   Command=/jobs/JobState=FAILED
   StdOut=/runs/a b/slurm-12.log
"""
OF_TWO_COMPONENTS = SHOWN + "\n" + SHOWN.replace("RUNNING", "PENDING")

# Prints $SHOWN for "show", writes down how it was called, and fails where $FAIL says.
STAND_IN = """#!/bin/bash
echo "$SLURM_TIME_FORMAT $*" >>"$CALLS"
[[ "$FAIL" != *"$1"* ]] || exit 1
[[ "$1" != show ]] || printf '%s' "$SHOWN"
"""

Answer = Callable[..., None]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def answer(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Makes scontrol answer."""

    def one(shown: str = SHOWN, fail: str = "") -> None:
        path = tmp_path / "scontrol"
        path.write_text(STAND_IN)
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        for name, value in (("SHOWN", shown), ("FAIL", fail), ("CALLS", str(calls))):
            monkeypatch.setenv(name, value)

    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return one


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        ({"SLURM_CONF": "/etc/slurm.conf"}, None),
        ({"SLURM_JOB_ID": "12"}, "12"),
        # The number of an array's last task is that of the array
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3"),
        ({"SLURM_JOB_ID": "13", "SLURM_HET_JOB_ID": "12"}, "12"),
    ],
)
def test_id(environ, wanted):
    job = SlurmJob.current(environ)
    assert (job and job.id) == wanted


def test_what_scontrol_says(answer, calls):
    answer()
    job = SlurmJob("12_3")
    assert job.state() == "RUNNING"
    assert job.requeueable()
    assert job.end_time() == 1700028800.0
    assert job.log() == "/runs/a b/slurm-12.log"
    assert set(calls.read_text().splitlines()) == {"%s show job 12_3"}


def test_first_of_two_components_speaks_for_the_job(answer):
    answer(OF_TWO_COMPONENTS)
    assert SlurmJob("12").state() == "RUNNING"


def test_time_limit(answer, monkeypatch):
    answer(SHOWN.replace("08:00:00", "UNLIMITED"))
    assert SlurmJob("12").end_time() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000500")
    assert SlurmJob("12").end_time() is None
    answer(fail="show")
    assert SlurmJob("12").end_time() == 1700000500.0


@pytest.mark.parametrize("how", ["fails", "is missing", "hangs"])
def test_scontrol_that_does_not_answer(answer, tmp_path, monkeypatch, how):
    answer(fail="show")
    if how == "is missing":
        (tmp_path / "scontrol").unlink()
        monkeypatch.setenv("PATH", str(tmp_path))
    if how == "hangs":
        (tmp_path / "scontrol").write_text("#!/bin/bash\nexec sleep 60\n")
        monkeypatch.setattr(slurm_job, "ANSWER_SECONDS", 0.2)
    job = SlurmJob("12")
    assert job.state() is None
    assert job.end_time() is None
    assert job.log() is None
    assert not job.requeueable()
    assert not job.requeue()


def test_running_job_is_requeued(answer, calls):
    answer()
    assert SlurmJob("12_3").requeue()
    assert calls.read_text().splitlines()[-1] == "%s requeue 12_3"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "PREEMPTED"])
def test_job_that_slurm_ends_is_left_alone(answer, calls, state):
    answer(SHOWN.replace("JobState=RUNNING", f"JobState={state}"))
    assert not SlurmJob("12").requeue()
    assert "requeue" not in calls.read_text()


def test_job_that_may_not_be_requeued_is_left_alone(answer, calls):
    answer(SHOWN.replace("Requeue=1", "Requeue=0"))
    assert not SlurmJob("12").requeueable()
    assert not SlurmJob("12").requeue()
    assert "requeue" not in calls.read_text()


def test_failed_requeue_is_said(answer):
    answer(fail="requeue")
    assert not SlurmJob("12").requeue()
