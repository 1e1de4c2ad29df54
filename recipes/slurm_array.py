"""Clips of a suite as a job array of SLURM that Python submits (submitit): what slurm-array.sbatch does, and jobs that were preempted go on.

    pip install submitit
    python recipes/slurm_array.py 64 self-forcing --suite vbench-extended

runs/ and weights/ have to be on a disk that all nodes see; `rfbench generate` without --shard then collects the rows of all jobs.
Where there is no SLURM the jobs are processes of this machine.
"""

import subprocess
import sys
from dataclasses import dataclass

import submitit


@dataclass(frozen=True)
class Shard:
    """A job of the array; started anew it makes the clips that are not there yet."""

    arguments: list[str]
    which: str

    def __call__(self) -> None:
        subprocess.run([sys.executable, "-m", "rfbench.cli", "generate", *self.arguments, "--shard", self.which], check=True)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit puts back into the queue when the job's time is over or its node is taken."""
        return submitit.helpers.DelayedSubmission(self)


count, arguments = int(sys.argv[1]), sys.argv[2:]
executor = submitit.AutoExecutor(folder="runs/slurm")
executor.update_parameters(name="rfbench-clips", gpus_per_node=1, timeout_min=6 * 60)
jobs = executor.submit_array([Shard(arguments, f"{number}/{count}") for number in range(1, count + 1)])
print(*(job.job_id for job in jobs))
