"""One run of a study: which measurements are missing, and how they are taken."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sret_cli.cost.published import published_columns
from sret_cli.runtime.errors import (
    RESOURCES,
    SOME_FAILED,
    SPEC,
    SretError,
    as_out_of_memory,
    show_note,
)
from sret_cli.runtime.files import read_json, write_json
from sret_cli.runtime.progress import Progress
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import CONFIG_FILE, Row, Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.dispatch import Team
from sret_cli.study.rows import planned_row, provenance
from sret_cli.training.config import refuse_other_config, write_config

if TYPE_CHECKING:
    from sret_cli.cost.breakdown import Profile

LOST = "lost"  # status of a run whose process died too often
MEASURED_IMAGES = 8  # of one step, for models that are only measured


def profile_run(run: Run, options: RunOptions) -> tuple[Row, "Profile"]:
    """The row and the costs of a run that is measured and not kept.

    If the device has too little memory, the row has an `error` in place of measured times.
    """
    from sret_cli.cost.trace import profile

    costs = profile(run.model, options.full_trace)
    row = {**planned_row(run), **provenance(), **costs.row()}
    row |= published_columns(run.model, costs.params, costs.macs)
    if options.measure_batch_size is not None:
        try:
            row |= _speed(run, options)
        except SretError as error:
            if error.code != RESOURCES:
                raise
            row["error"] = str(error)
    return row, costs


def _speed(run: Run, options: RunOptions) -> Row:
    from sret_cli.cost.timing import measure_speed
    from sret_cli.runtime.device import choose_device

    assert options.measure_batch_size is not None
    device = choose_device(options.device)
    with _out_of_memory_is_an_error():
        return measure_speed(
            run.model,
            device,
            options.measure_batch_size,
            options.precision,
            options.compiles,
            lambda reason: show_note(f"not compiled: {reason}"),
        )


def predicted_memory_columns(
    run: Run,
    options: RunOptions,
    recompute: str | int | None = None,
    precision: str | None = None,
) -> Row:
    """The columns of a row about the memory of a training step and of inference, in bytes.

    They are null for timm models. Inference is that of the model as it is evaluated, not of its
    fused copy. If `recompute`, `precision` or the batch size of the options is None, the value of
    the training is taken; its batch is one of the `accumulation` parts of a step.
    """
    from sret_cli.cost.footprint import Setting
    from sret_cli.cost.memory import largest_batch, predict_memory
    from sret_cli.runtime.device import device_type

    device = "cpu" if device_type(options.device) == "cpu" else "cuda"
    train = run.train or TrainSpec()
    chosen = train.recompute if recompute is None else recompute
    at_once = -(-train.batch_size // train.accumulation) if run.train else MEASURED_IMAGES
    setting = Setting(
        options.measure_batch_size or at_once, precision or train.precision, device, train.opt
    )
    row: Row = {
        "memory_device": device,
        "memory_batch_size": setting.batch_size,
        "memory_precision": setting.precision,
        "memory_recompute": chosen,
        "gpu_memory_bytes": options.gpu_memory,
    }
    if run.model.is_timm:
        return row
    memory, plan = predict_memory(run.model, setting, chosen, options.gpu_memory)
    row |= {**memory.row(), **plan._asdict(), "fits": None, "largest_batch": None}
    if options.gpu_memory is not None:
        row["fits"] = memory.training_memory_bytes <= options.gpu_memory
        row["largest_batch"] = largest_batch(run.model, setting, chosen, options.gpu_memory)
    return row


def execute_run(
    run: Run,
    row: Row,
    *,
    missing: list[str],
    directory: Path,
    options: RunOptions,
    progress: Progress,
    team: Team | None,
    is_alone: bool = True,
) -> None:
    """Takes the missing measurements of a run, and writes its row, also if it failed by itself.

    Args:
        run: the run.
        row: its row so far, which is filled in.
        missing: what to measure, as `missing_measurements` names it.
        directory: the directory of the run.
        options: how to measure.
        progress: receives the progress of a training.
        team: the processes that train; None if nothing is trained.
        is_alone: whether it is the only run, so that nothing is kept of one that cannot be built.

    Raises:
        SretError: the run failed.
    """
    if (path := directory / CONFIG_FILE).exists():  # a training updates the paths of its data
        refuse_other_config(str(path), read_json(path), run.spec())
    else:
        write_config(directory, {"study": run.study, "name": run.name, **run.spec()})
    try:
        with _out_of_memory_is_an_error():
            if "cost" in missing:
                row |= measure_cost(run, options)
            if "speed" in missing:
                row |= _speed(run, options)
            if "training" in missing:
                assert team is not None
                row |= team.train(run, directory, progress)
                row["status"] = "done"
    except SretError as error:
        codes = (SOME_FAILED, RESOURCES) if is_alone else (SPEC, SOME_FAILED, RESOURCES)
        own_reason = error.code in codes and error.status != "disk_full"
        if own_reason:
            row |= {"status": error.status, "error": str(error)}
            write_json(directory / "row.json", row)
        raise
    write_json(directory / "row.json", row)


def missing_measurements(row: Row, run: Run, options: RunOptions, trains: bool) -> list[str]:
    """What a row lacks: some of "cost", "speed" and "training", in the order of their execution.

    A run that failed lacks nothing, unless the options say that it is tried again.
    """
    if row["error"] and not is_tried_again(row, options):
        return []
    missing = ["cost"] if row["macs"] is None else []
    if options.measure_batch_size is not None and (
        row["forward_seconds"] is None
        or options.device.partition(":")[0] not in ("auto", row["measured_device"])
        or row["measured_batch_size"] != options.measure_batch_size
        or row["measured_precision"] != options.precision
        or row["measured_compile"] != options.compiles
    ):
        missing.append("speed")
    if trains and run.train is not None and row["final_loss"] is None:
        missing.append("training")
    return missing


def is_tried_again(row: Row, options: RunOptions) -> bool:
    """Whether a run that failed before this command began is done again."""
    kind = LOST if row["status"] == LOST else "failed"
    return kind in options.retry and row["started_at"] < options.began_at


def measure_cost(run: Run, options: RunOptions) -> Row:
    """The columns of a row about the exact cost of a run's model, next to published numbers."""
    from sret_cli.cost.trace import profile

    costs = profile(run.model, options.full_trace)
    return {**costs.row(), **published_columns(run.model, costs.params, costs.macs)}


@contextmanager
def _out_of_memory_is_an_error() -> Iterator[None]:
    """Raises the out-of-memory errors of torch and Python as `SretError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        found = as_out_of_memory(error)
        if found is None:
            raise
        raise found from None
