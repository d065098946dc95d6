"""How processes come to be in a job of Slurm, before Lightning looks."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

_INTERACTIVE = ("interactive", "bash")
"""Names of jobs that salloc and a shell under srun have. Lightning takes such a process for one by itself."""


def settle_srun(environ: MutableMapping[str, str] = os.environ) -> None:
    """Refuse a process that would wait for others for ever, and let those of a step find each other.

    Raises:
        ValueError: if the job has several tasks, but this process was not started by srun.
    """
    tasks = environ.get("SLURM_NTASKS", "1")
    if not tasks.isdigit() or int(tasks) < 2:
        return
    interactive = environ.get("SLURM_JOB_NAME") in _INTERACTIVE
    if "SLURM_STEP_ID" not in environ:
        if not interactive:
            raise ValueError(
                f"SLURM_NTASKS ({tasks}) processes train together, but srun must start them, or this one "
                "waits for ever; write srun l2l-scale fit … in the job script (slurm/train.sbatch does)"
            )
    elif interactive and "SLURM_PTY_PORT" not in environ:  # srun inside salloc, and no shell
        environ["SLURM_JOB_NAME"] = "l2l-scale"
