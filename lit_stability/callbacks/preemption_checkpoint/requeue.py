"""Puts a SLURM job back into its queue. Imports neither torch nor Lightning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from lit_stability.lightning_choice import suite_logger

log = suite_logger()

_TIMEOUT = 20.0
"""Seconds that ``scontrol`` may take."""


def job_id(environment: Mapping[str, str]) -> str | None:
    """Returns the id of the SLURM job, or of the task of a job array; None outside of a job.

    >>> job_id({"SLURM_JOB_ID": "12"})
    '12'
    >>> job_id({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "2"})
    '12_2'
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    found = environment.get("SLURM_JOB_ID", "") if array is None else f"{array}_{task}"
    return found if re.fullmatch("[0-9]+(_[0-9]+)?", found) else None


def requeue() -> None:
    """Runs ``scontrol requeue JOB``; logs it, also where that fails, and never raises."""
    job, command = job_id(os.environ), shutil.which("scontrol")
    if job is None or command is None:
        missing = "SLURM_JOB_ID is not set" if job is None else "scontrol is not on PATH"
        log.warning("the job is not requeued: %s", missing)
        return
    try:
        done = subprocess.run(
            [command, "requeue", job], capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the job is not requeued: %s", error)
        return
    if done.returncode:
        answer = (done.stderr or done.stdout).strip()
        log.warning("scontrol requeue %s failed with %d: %s", job, done.returncode, answer)
    else:
        log.info("requeued the SLURM job %s", job)
