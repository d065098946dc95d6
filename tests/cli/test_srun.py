"""How fit takes the processes of a Slurm job."""

from __future__ import annotations

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from l2l_scale.cli.main import main
from l2l_scale.cli.srun import settle_srun

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0"}


def test_python_in_a_batch_script_without_srun_is_refused_instead_of_waiting():
    with pytest.raises(ValueError, match=r"SLURM_NTASKS \(2\).*srun l2l-scale fit"):
        settle_srun(dict(BATCH))


def test_fit_says_so(monkeypatch, capsys):
    for name, value in BATCH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "there is none"])
    assert stop.value.code == 2
    assert "srun must start them" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**BATCH, "SLURM_NTASKS": "1"},
        {**BATCH, "SLURM_STEP_ID": "0"},
        {**BATCH, "SLURM_JOB_NAME": "interactive"},  # the shell that salloc opens
        {**BATCH, "SLURM_JOB_NAME": "bash", "SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "4"},  # srun --pty bash
    ],
    ids=["no Slurm", "one process", "srun", "salloc", "shell under srun"],
)
def test_other_processes_are_left_as_they_are(environ):
    before = dict(environ)
    settle_srun(environ)
    assert environ == before


def test_srun_inside_salloc_makes_one_run_of_its_processes(monkeypatch):
    for name, value in {**BATCH, "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "interactive"}.items():
        monkeypatch.setenv(name, value)
    assert not SLURMEnvironment.detect()
    settle_srun()
    assert SLURMEnvironment.detect()


def test_jobs_have_ports_of_their_own_and_none_of_rays(monkeypatch):
    """Lightning makes them from the job's id; slurm/ray.sh takes its own from 25,000 on."""
    ports = set()
    for job in ("7", "8", "19999"):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        for name, value in {**BATCH, "SLURM_JOB_ID": job, "SLURM_NTASKS": "1"}.items():
            monkeypatch.setenv(name, value)
        ports.add(SLURMEnvironment().main_port)
    assert ports == {15007, 15008, 24999}
