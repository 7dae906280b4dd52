"""One run of a study: what is missing of it, and how that is measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sret_cli.cost.published import published_columns
from sret_cli.runtime.errors import RESOURCES, SOME_FAILED, SretError, as_out_of_memory, show_note
from sret_cli.runtime.files import read_json, write_json
from sret_cli.runtime.progress import Display
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import CONFIG_FILE, Row, Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.dispatch import Team
from sret_cli.study.rows import provenance
from sret_cli.training.config import refuse_other_config, write_config

if TYPE_CHECKING:
    from sret_cli.cost.breakdown import Profile
from sret_cli.study.rows import planned_row

MEASURED_IMAGES = 8  # a step, of models that are only measured


def profile_run(run: Run, options: RunOptions) -> tuple[Row, "Profile"]:
    """The row of a run that is measured and not kept, beside published figures of its model.

    Where the device's memory does not suffice, the row has an `error` in place of measurements.
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

    They are null for models of timm's. Inference is of the model as it is evaluated, not of its
    fused copy. Where `recompute`, `precision` or the batch size of the options is None, it is the
    training's own; its batch is the images of one step, or of one of its `accumulation` parts.
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


def _measure(
    missing: list[str],
    row: Row,
    run: Run,
    directory: Path,
    options: RunOptions,
    display: Display,
    team: Team | None,
) -> None:
    """Does what a run lacks, and writes its row, also where it failed for a reason of its own.

    Raises:
        SretError: it failed.
    """
    if (path := directory / CONFIG_FILE).exists():  # the training writes where data lie now
        refuse_other_config(str(path), read_json(path), run.spec())
    else:
        write_config(directory, {"study": run.study, "name": run.name, **run.spec()})
    try:
        with _out_of_memory_is_an_error():
            for measurement in missing:
                row |= _do(measurement, run, directory, options, display, team)
        if "training" in missing:
            row["status"] = "done"
    except SretError as error:
        own_reason = error.code in (SOME_FAILED, RESOURCES) and error.status != "disk_full"
        if own_reason:
            row |= {"status": error.status, "error": str(error)}
            write_json(directory / "row.json", row)
        raise
    write_json(directory / "row.json", row)


def _missing(row: Row, run: Run, options: RunOptions, trains: bool) -> list[str]:
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


def _do(
    measurement: str,
    run: Run,
    directory: Path,
    options: RunOptions,
    display: Display,
    team: Team | None,
) -> Row:
    if measurement == "cost":
        from sret_cli.cost.trace import profile

        costs = profile(run.model, options.full_trace)
        return {**costs.row(), **published_columns(run.model, costs.params, costs.macs)}
    if measurement == "speed":
        return _speed(run, options)
    assert team is not None
    return team.train(run, directory, display.of_run())


@contextmanager
def _out_of_memory_is_an_error() -> Iterator[None]:
    """Turns torch's and Python's out-of-memory errors into the user's error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        found = as_out_of_memory(error)
        if found is None:
            raise
        raise found from None
