"""The Slurm engine: a job array whose tasks take the runs of a study, each by workers of its own.

A task starts the workers of the local engine on its node and ends when no run is left for it. Slurm
signals a task before its time is up, and when another job takes its place. The task then lets its
workers save their state, and asks Slurm to queue it again unless Slurm does so by itself. A task
that starts again takes runs like any other, and goes on from their checkpoints.

submitit writes the script of the job and starts the task. Its own handlers are replaced: they
ignore SIGTERM, which is the only signal of `scontrol requeue`, and ask for a new place in the queue
before anything is saved.
"""

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from sret_cli.runtime.errors import SOME_FAILED, USAGE, SretError
from sret_cli.runtime.files import make_directory
from sret_cli.runtime.signals import EXIT_CODES
from sret_cli.spec.run import Row, Run
from sret_cli.study.deaths import last_lines
from sret_cli.study.engines import Board, EngineOptions
from sret_cli.study.pool import LOOK_SECONDS, STOP_SECONDS, Pool, take_rows
from sret_cli.study.shares import divide, jobs_on_gpus, visible_gpus
from sret_cli.study.slurm_queue import SLURM_FOLDER, queued_tasks
from sret_cli.study.work import summary_line
from sret_cli.study.worker import Work

MOST_TASKS = 64  # of --jobs auto
MINUTES = "60"  # of a task if `time` is not given; it is then queued again
SQUEUE_EVERY_SECONDS = 10.0
# Options of sbatch on which the array depends.
OWN_OPTIONS = ("array", "nodes", "ntasks", "ntasks-per-node", "output", "error", "signal")


def run(work: Work, engine: EngineOptions, board: Board) -> None:
    """Submits a job array that does the runs of a study; waits for its end if `engine.wait`.

    Raises:
        SretError: there is no Slurm or no submitit, Slurm refuses the job, or it ended too early.
    """
    left = {run.run_id: run for run in work.study.runs}
    take_rows(work, left, board.on_end)
    if not left:
        return
    folder = Path(os.path.abspath(work.root)) / work.study.name / SLURM_FOLDER
    job = submit(work, engine, len(left), folder, board.note)
    if engine.wait:
        wait_for_rows(work, left, job, folder, board)
    else:
        board.is_submitted = True


def submit(
    work: Work, engine: EngineOptions, left: int, folder: Path, note: Callable[[str], None]
) -> str:
    """Submits the job array, says how to watch it, and returns its id.

    Raises:
        SretError: there is no Slurm or no submitit, or Slurm refuses the job.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise SretError("--engine slurm: no sbatch on this machine; run it where Slurm is", USAGE)
    try:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError:
        raise SretError(
            "--engine slurm needs submitit; install it by pip install 'sret[slurm]'", USAGE
        ) from None
    options, minutes = sbatch_options(engine)
    tasks = min(engine.jobs or MOST_TASKS, left)
    task = Task(replace(work, root=Path(os.path.abspath(work.root)), waits=False), engine)
    executor = SlurmExecutor(make_directory(folder), python=f"exec {shlex.quote(sys.executable)}")
    executor.update_parameters(
        job_name=f"sret-{work.study.name}",
        time=minutes,
        use_srun=False,
        additional_parameters=options,
    )
    try:
        with redirect_stderr(io.StringIO()):  # submitit also prints what Slurm says
            jobs = executor.submit_array([task] * tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: ").strip() for line in str(error).splitlines()]
        told = "; ".join(line.removeprefix("error: ") for line in lines if line)
        raise SretError(f"Slurm refuses the job: {told}", USAGE) from None
    job: str = jobs[0].job_id.partition("_")[0]
    why = f" (auto: one for each run, at most {MOST_TASKS})" if engine.jobs is None else ""
    note(
        f"Slurm job {job}: {tasks} tasks{why} of {minutes} minutes take {left} runs; logs: {folder}"
    )
    watch = _watch_command(work)
    note(f"watch it by `{watch}` or `squeue -j {job}`; end it by `scancel {job}`")
    return job


def _watch_command(work: Work) -> str:
    """The command that shows the runs, by the study file if there is one: it knows them all."""
    study = work.study
    file = (study.folder or Path()) / f"{study.name}.toml"
    if study.folder is None or not file.is_file():
        return shlex.join(["sret", "status", str(work.root / study.name), "--watch"])
    return shlex.join(["sret", "status", str(file), "--runs", str(work.root), "--watch"])


def sbatch_options(engine: EngineOptions) -> tuple[dict[str, Any], int]:
    """The options of sbatch by name, and the minutes of a task.

    Raises:
        SretError: an option is not valid, or is set by this engine.
    """
    given: dict[str, Any] = {key.replace("_", "-"): value for key, value in engine.slurm}
    for key in OWN_OPTIONS:
        if key in given:
            raise SretError(f"--slurm {key}: sret sets it itself; leave it out", USAGE)
    minutes = given.pop("time", MINUTES)
    if not minutes.isdecimal() or int(minutes) == 0:
        raise SretError(f"--slurm time={minutes}: give whole minutes, such as time=240", USAGE)
    before_end = int(min(STOP_SECONDS, int(minutes) * 30))
    own = {"requeue": True, "signal": f"B:USR2@{before_end}"}  # B: to the task, not its workers
    flags = {key: True if value == "true" else value for key, value in given.items()}
    return {**flags, **own}, int(minutes)


@dataclass
class Task:
    """What each task of the array does; submitit calls it on a node."""

    work: Work
    engine: EngineOptions

    def __call__(self) -> None:
        """Takes runs until none is left; after a signal it saves, and is queued again."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, _end)
        work, engine = self.work, self.engine
        try:
            gpus = visible_gpus(work.options.device)
            shares = divide(
                jobs_on_gpus(gpus, engine.gpus_per_run, engine.runs_per_gpu),
                work.options.device,
                gpus,
                engine.gpus_per_run,
                engine.runs_per_gpu,
                work.options.workers,
            )
            Pool(work, shares, _print_end, retries=engine.retries).run()
        except SretError as error:
            print(f"sret: {error}", file=sys.stderr)
            raise SystemExit(error.code) from None
        except SystemExit:
            _requeue()
            raise


def _print_end(run: Run, row: Row) -> None:
    print(summary_line(f"{run.name} {run.run_id}", row, True), flush=True)


def _end(number: int, frame: Any) -> NoReturn:
    for other in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(EXIT_CODES[signal.Signals(number)])


def _requeue() -> None:
    """Asks Slurm to queue this task again, if it was only warned.

    A task that was cancelled, or that Slurm queues again by itself, is no longer running.
    """
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the plain id can stand for all tasks of the array
        job = "{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format_map(os.environ)
    if any(task.state == "RUNNING" for task in queued_tasks([job]) or ()):
        subprocess.run(["scontrol", "requeue", job], check=True)


def wait_for_rows(work: Work, left: dict[str, Run], job: str, folder: Path, board: Board) -> None:
    """Waits until each run has a row.

    Raises:
        SretError: the job has ended, and some runs have no row.
    """
    asked = time.monotonic()
    while left:
        time.sleep(LOOK_SECONDS)
        is_gone = False
        if time.monotonic() - asked > SQUEUE_EVERY_SECONDS:
            asked, is_gone = time.monotonic(), queued_tasks([job]) == []
        take_rows(work, left, board.on_end)
        board.on_look()
        if left and is_gone:
            logs = sorted(folder.glob(f"{job}_*.err"), key=os.path.getmtime)
            told = "".join(f", whose last line is {line!r}" for line in last_lines(logs[-1], 1))
            raise SretError(
                f"Slurm job {job} has ended, and {len(left)} of {len(work.study.runs)} runs have "
                f"no row ({', '.join(sorted(left))}); its logs are in {folder}{told}",
                SOME_FAILED,
            )
