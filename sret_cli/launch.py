"""The runs of a study, one after another on this machine; what is there stays."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sret_cli import records
from sret_cli.axes import run_labels
from sret_cli.backbone import BackboneSpec
from sret_cli.contents import Contents
from sret_cli.errors import RESOURCES, SOME_FAILED, SretError, note, out_of_memory
from sret_cli.paths import PATH_FIELDS, check_path
from sret_cli.progress import Display
from sret_cli.published import published_columns
from sret_cli.recipe import TrainSpec
from sret_cli.records import Row
from sret_cli.run import Run
from sret_cli.study import Study
from sret_cli.team import Options, Team

if TYPE_CHECKING:
    from sret_cli.breakdown import Profile

INFERENCE_NOTE = (
    "Inference is of the model as `sret eval` runs it. Its fused copy, which `sret profile "
    "--device` times, needs less."
)
MEASURED_IMAGES = 8  # a step, of models that are only measured


@dataclass
class Outcome:
    """The rows of a study's runs, how many runs were there already, and what failed."""

    rows: list[Row] = field(default_factory=list)
    skipped: int = 0
    failed: list[tuple[Run, SretError]] = field(default_factory=list)


def profile_run(run: Run, options: Options) -> tuple[Row, "Profile"]:
    """The row of a run that is measured and not kept, beside published figures of its model.

    Where the device's memory does not suffice, the row has an `error` in place of measurements.
    """
    from sret_cli.profiler import profile

    costs = profile(run, options.full_trace)
    row = {**run.row(), **records.provenance(), **costs.row()}
    row |= published_columns(run.model, costs.params, costs.macs)
    if options.measure_batch_size is not None:
        try:
            row |= _speed(run, options)
        except SretError as error:
            if error.code != RESOURCES:
                raise
            row["error"] = str(error)
    return row, costs


def _speed(run: Run, options: Options) -> Row:
    from sret_cli.measure import choose_device, measure

    assert options.measure_batch_size is not None
    device = choose_device(options.device)
    with _out_of_memory_is_an_error():
        return measure(
            run.model,
            device,
            options.measure_batch_size,
            options.precision,
            options.compiles,
            lambda reason: note(f"not compiled: {reason}"),
        )


def predict_memory(
    run: Run,
    options: Options,
    recompute: str | int | None = None,
    precision: str | None = None,
) -> Row:
    """The columns of a row about the memory of a training step and of inference, in bytes.

    They are null for models of timm's. Inference is of the model as it is evaluated, not of its
    fused copy. Where `recompute`, `precision` or the batch size of the options is None, it is the
    training's own; its batch is the images of one step, or of one of its `accumulation` parts.
    """
    from sret_cli.measure import device_type
    from sret_cli.memory import Setting, largest_batch, predict

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
    if isinstance(run.model, BackboneSpec):
        return row
    memory, plan = predict(run.model, setting, chosen, options.gpu_memory)
    row |= {**memory.row(), **plan._asdict(), "fits": None, "largest_batch": None}
    if options.gpu_memory is not None:
        row["fits"] = memory.training_memory_bytes <= options.gpu_memory
        row["largest_batch"] = largest_batch(run.model, setting, chosen, options.gpu_memory)
    return row


def memory_verdict(row: Row) -> str:
    """What the prediction of a row comes to, in a line."""
    if "training_memory_bytes" not in row:
        return f"{row['name']}: the memory of timm's models is not predicted; use --device"
    needed, budget = row["training_memory_bytes"], row["gpu_memory_bytes"]
    text = f"{row['name']}: {row['memory_batch_size']} images need {needed / 1e9:.2f} GB to train"
    if any(row["segments"]):
        passes = zip(row["recomputed"], row["segments"], strict=True)
        text += "; recomputed are " + ", ".join(f"{n} passes by {k}" for n, k in passes)
    if budget is None:
        return text
    most = f"{row['largest_batch']} images fit" if row["largest_batch"] else "no batch fits"
    if row["fits"]:
        return f"{text}; they fit {budget / 1e9:g} GB, and {most} at the most"
    return f"{text}, {(needed - budget) / 1e9:.2f} GB more than {budget / 1e9:g} GB; {most}"


def run_study(
    study: Study, root: Path, options: Options, console: Console, trains: bool = True
) -> Outcome:
    """Profiles and, where asked, trains each run of a study, and writes their rows.

    A run that fails for a reason of its own (diverged, out of memory) becomes a row with `error`,
    and the others go on. Of several processes that torchrun or Slurm started, the first one does
    so, and the others take part in its trainings, and leave here.

    Raises:
        SretError: the data, the device or the root cannot be used, which would fail every run; or
            a run's backbone cannot be built, which is found out before the first run starts.
    """
    team = Team(options) if trains else None
    if team is not None and not team.leads:
        team.follow()
    with nullcontext() if team is None else team.leading():
        return _run_study(study, root, options, console, trains, team)


def _run_study(
    study: Study, root: Path, options: Options, console: Console, trains: bool, team: Team | None
) -> Outcome:
    if trains:
        _check_paths(study)
    outcome = Outcome()
    display = Display(console, study.name, len(study.runs))
    study = replace(study, runs=tuple(_identified(study, trains, display)))
    _check_backbones(study, root)
    labels = run_labels([run.row() for run in study.runs])
    with _says_what_was_kept(study, root, outcome, console), display.live():
        for number, (run, label) in enumerate(zip(study.runs, labels, strict=True), 1):
            if not run.is_identified:
                outcome.rows.append(profile_run(run, options)[0])
                display.finish(f"[{number}/{len(study.runs)}] {run.name}: measured, not kept")
                continue
            directory = run.directory(root)
            row = records.read_row(directory) or {**run.row(), **records.provenance()}
            missing = _missing(row, run, options, trains)
            if not missing:
                outcome.skipped += 1
            else:
                display.start(label)
                if run.train is None or "training" in missing:
                    row |= {"status": None, "error": None, **records.provenance()}
                    row |= {k: v for k, v in run.row().items() if k.startswith("train.")}
                if "training" in missing:
                    _note_other_contents(run, root, display)
                try:
                    with records.locked(directory):
                        _measure(missing, row, run, directory, options, display, team)
                except SretError as error:
                    if team is not None and team.lost:
                        raise
                    if not isinstance(error, records.Busy) and not row["error"]:
                        _remove_unless_begun(directory)
                        raise
                    row |= {"status": row["status"] or "busy", "error": str(error)}
                    outcome.failed.append((run, error))
            outcome.rows.append(row)
            display.finish(f"[{number}/{len(study.runs)}] {_summary(label, row, bool(missing))}")
    return outcome


def _identified(study: Study, trains: bool, display: Display) -> list[Run]:
    """The runs with the contents of what they read, each once, though it was named in two ways.

    Measuring needs no data: where they are missing, the run has no id to keep its row by.

    Raises:
        SretError: it is to be trained, and data, weights or labels are missing.
    """
    if all(run.is_identified and run.contents is None for run in study.runs):
        return list(study.runs)
    from sret_cli.identify import Identifier

    identifier = Identifier()
    found: dict[Any, Run] = {}
    for run in study.runs:
        try:
            run = identifier.identify(run)
            found.setdefault(run.run_id, run)
        except SretError as error:
            if trains:
                raise
            display.note(f"{run.name}: measured and not kept: {error}")
            found[id(run)] = run
    return list(found.values())


def _note_other_contents(run: Run, root: Path, display: Display) -> None:
    """Says that a new run shares nothing with one of the same settings and of other data."""
    directory = run.directory(root)
    if directory.exists():
        return
    for path in sorted(directory.parent.glob(f"*/{records.CONFIG_FILE}")):
        other = records.read_json(path)
        if records.same_settings(other, run.spec()):
            differ = Contents.of(other.get("contents")).differences(run.contents or Contents())
            display.note(
                f"{path.parent} has the same settings, but other {' and '.join(differ)}: "
                f"{run.run_id} is a new run and shares nothing with it"
            )


def _measure(
    missing: list[str],
    row: Row,
    run: Run,
    directory: Path,
    options: Options,
    display: Display,
    team: Team | None,
) -> None:
    """Does what a run lacks, and writes its row, also where it failed for a reason of its own.

    Raises:
        SretError: it failed.
    """
    if (path := directory / records.CONFIG_FILE).exists():  # the training writes where data lie now
        records.refuse_other_config(str(path), records.read_json(path), run.spec())
    else:
        records.write_config(directory, {"study": run.study, "name": run.name, **run.spec()})
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
            records.write_json(directory / "row.json", row)
        raise
    records.write_json(directory / "row.json", row)


def _remove_unless_begun(directory: Path) -> None:
    """Removes what a run left that could not be done, and the study's directory if it is empty."""
    if not (directory / "row.json").exists() and not list(directory.glob("checkpoint-*")):
        shutil.rmtree(directory, ignore_errors=True)
        for parent in list(directory.parents)[:2]:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _check_backbones(study: Study, root: Path) -> None:
    known = [run for run in study.runs if run.is_identified]
    new = [run for run in known if records.read_row(run.directory(root)) is None]
    for spec in dict.fromkeys(run.model for run in new):
        if isinstance(spec, BackboneSpec) and len(new) > 1:
            from sret_cli.recurse import build_backbone

            build_backbone(spec)


def _check_paths(study: Study) -> None:
    for run in study.runs:
        if run.train is not None and run.contents is None:
            for field in PATH_FIELDS:
                check_path(field, getattr(run.train, field), study.folder)


def _missing(row: Row, run: Run, options: Options, trains: bool) -> list[str]:
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
    options: Options,
    display: Display,
    team: Team | None,
) -> Row:
    if measurement == "cost":
        from sret_cli.profiler import profile

        costs = profile(run, options.full_trace)
        return {**costs.row(), **published_columns(run.model, costs.params, costs.macs)}
    if measurement == "speed":
        return _speed(run, options)
    assert team is not None
    return team.train(run, directory, display.on_step, display.note)


@contextmanager
def _says_what_was_kept(
    study: Study, root: Path, outcome: Outcome, console: Console
) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        console.print(
            f"stopped: {len(outcome.rows)} of {len(study.runs)} runs are done and kept in "
            f"{root / study.name}; type the same command to go on where the one under way was"
        )
        raise


@contextmanager
def _out_of_memory_is_an_error() -> Iterator[None]:
    """Turns torch's and Python's out-of-memory errors into the user's error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        found = out_of_memory(error)
        if found is None:
            raise
        raise found from None


def _summary(label: str, row: Row, done: bool) -> str:
    if row["error"]:
        return f"{label}: failed: {row['error']}"
    top1 = row["top1_percent"]
    accuracy = "" if top1 is None else f", top-1 {top1:.2f} %"
    return f"{label}{accuracy}" + ("" if done else ": there already")
