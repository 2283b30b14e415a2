"""Asking Slurm to run the job again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from fabric_lite.errors import LaunchError
from fabric_lite.launch.job import print_line

__all__ = ["check_requeue", "is_first_of_job", "requeue"]


def check_requeue(environ: Mapping[str, str]) -> None:
    """Raise unless this is a job of Slurm's.

    Raises:
        LaunchError: It is not.
    """
    if "SLURM_JOB_ID" not in environ:
        raise LaunchError(
            "--requeue asks Slurm to run the job again, and this is no job of Slurm's.",
            given="--requeue without SLURM_JOB_ID in the environment",
            fix="start fabric-run by sbatch or srun, or leave --requeue out",
        )


def is_first_of_job() -> bool:
    """Whether this is the first of the tasks that Slurm runs: the one to requeue before the nodes have met."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


def requeue() -> None:
    """Put this process's Slurm job back into the queue; Slurm ends the running one then."""
    job = os.environ["SLURM_JOB_ID"]
    # Said before, because Slurm may end this process at once.
    print_line(f"fabric-run: requeueing Slurm job {job}.")
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        words = getattr(error, "stderr", None) or str(error)
        print_line(f"fabric-run: Slurm has not taken the job back: {words.strip()}")
