"""What Slurm's queue knows of the jobs of a study."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SLURM_FOLDER = "slurm"  # in the directory of a study: scripts and logs of its jobs
SQUEUE_SECONDS = 30.0  # after which Slurm is taken not to answer


@dataclass(frozen=True)
class QueuedTask:
    """A task of a job that is in the queue.

    Attributes:
        job: id of the job.
        state: PENDING, RUNNING, COMPLETING …
        reason: why it does not run, or None.
        node: where it runs; empty if it does not.
    """

    job: str
    state: str
    reason: str
    node: str


def queued_tasks(jobs: Sequence[str]) -> list[QueuedTask] | None:
    """The tasks of jobs that have not ended; None if Slurm does not answer.

    Args:
        jobs: ids of jobs, or of tasks such as 12_3.
    """
    if not jobs or shutil.which("squeue") is None:
        return None
    command = [
        "squeue",
        "--noheader",
        "--array",
        "--format=%F|%T|%r|%N",
        f"--jobs={','.join(jobs)}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:  # a job that ended long ago is unknown
        return [] if "Invalid job id" in done.stderr else None
    return [QueuedTask(*line.split("|", 3)) for line in done.stdout.splitlines()]


def queue_lines(directory: Path) -> list[str]:
    """Lines about the jobs of a study in the queue, or of all studies in a directory.

    "Slurm job 12: 2 running on node1, node2; 4 pending (Resources)"
    """
    pickles = directory.glob(f"**/{SLURM_FOLDER}/*_submitted.pkl")
    jobs = {path.name.partition("_")[0] for path in pickles}
    tasks = queued_tasks(sorted(jobs)) or []
    lines = []
    for job in sorted({task.job for task in tasks}, key=int):
        own = [task for task in tasks if task.job == job]
        nodes = sorted({task.node for task in own if task.state == "RUNNING"})
        counts = Counter((task.state, task.reason) for task in own)
        parts = []
        for (state, reason), count in counts.items():
            where = {"RUNNING": f" on {', '.join(nodes)}", "PENDING": f" ({reason})"}.get(state, "")
            parts.append(f"{count} {state.lower()}{where}")
        lines.append(f"Slurm job {job}: {'; '.join(parts)}")
    return lines
