"""The local engine: worker processes on this machine."""

from collections.abc import Callable

from sret_cli.study.engines import Board, EngineOptions
from sret_cli.study.pool import Pool
from sret_cli.study.rows import read_row
from sret_cli.study.shares import Share, cores, divide, jobs_on_gpus, visible_gpus
from sret_cli.study.weight import weight_of
from sret_cli.study.worker import Work


def run(work: Work, engine: EngineOptions, board: Board) -> None:
    """Does the runs of a study by workers on this machine.

    Raises:
        SretError: an error that would fail every run.
    """
    shares = choose_shares(work, engine, board.note)
    Pool(work, shares, board.on_end, board.on_look, engine.retries).run()


def choose_shares(work: Work, engine: EngineOptions, note: Callable[[str], None]) -> list[Share]:
    """The shares of the machine for workers; how many and why is said."""
    options = work.options
    gpus = visible_gpus(options.device)
    left = [run for run in work.study.runs if read_row(run.directory(work.root)) is None]
    jobs, why = engine.jobs, "as asked for"
    if jobs is None and gpus:
        jobs = jobs_on_gpus(gpus, engine.gpus_per_run, engine.runs_per_gpu)
        why = f"{len(gpus)} GPUs"
    elif jobs is None and len(left) > 1 and engine.gpus_per_run == 1:
        from sret_cli.study.pace import best_jobs

        jobs, why = best_jobs(min(left, key=weight_of), len(left))
    jobs = min(jobs or 1, max(len(left), 1))
    shares = divide(
        jobs, options.device, gpus, engine.gpus_per_run, engine.runs_per_gpu, options.workers
    )
    first = shares[0]
    parts = f"{first.threads} threads" if not first.gpus else f"{len(first.gpus)} GPUs"
    parts += f", {first.loaders} loader processes" * bool(first.loaders)
    processes = jobs * first.processes
    over = f"; that is more than the {cores()} cores" if processes > cores() else ""
    note(f"{jobs} runs at a time ({why}), each with {parts}{over}")
    return shares
