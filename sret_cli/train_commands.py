"""The commands that train: `train` and `run`."""

from pathlib import Path
from typing import Annotated

import typer

from sret_cli.errors import USAGE, SretError
from sret_cli.flags import (
    MODEL_FLAGS,
    TRAIN_FLAGS,
    Backbone,
    BatchSize,
    Compile,
    DataDir,
    Dataset,
    Device,
    Epochs,
    EverySteps,
    GpuMemory,
    ImgSize,
    Json,
    LaterSlices,
    Layers,
    Macs,
    Minutes,
    Nll,
    NumClasses,
    OnBadImage,
    Params,
    Precision,
    Preset,
    Recompute,
    Recursions,
    Runs,
    Seed,
    Set,
    Shard,
    Share,
    Slices,
    StudyFile,
    Synthetic,
    Tensorboard,
    Twin,
    Workers,
    check_device,
    finish,
    flags_given,
    gpu_memory_of,
    notes,
    show_rows,
    study_from,
    write_report,
)


def train(
    context: typer.Context,
    study: StudyFile = None,
    preset: Preset = None,
    backbone: Backbone = None,
    layers: Layers = None,
    recursions: Recursions = None,
    share: Share = None,
    slices: Slices = None,
    recursive_slices: LaterSlices = None,
    nll: Nll = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    params: Params = None,
    macs: Macs = None,
    twin: Twin = None,
    set_: Set = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    synthetic: Synthetic = False,
    on_bad_image: OnBadImage = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    precision: Precision = None,
    device: Device = "auto",
    workers: Workers = None,
    compile_: Compile = None,
    recompute: Recompute = None,
    gpu_memory: GpuMemory = None,
    checkpoint_every_steps: EverySteps = None,
    checkpoint_minutes: Minutes = 10.0,
    tensorboard: Tensorboard = False,
    shard: Shard = False,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with that run, or with --epochs from its end.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Train the runs of a study that are missing, or one model: by default `nano` on `digits`.

    A run that was interrupted goes on from its newest checkpoint.
    """
    from sret_cli import report
    from sret_cli.launch import Options, run_study
    from sret_cli.run import continued
    from sret_cli.study import Study

    check_device(device)
    if resume is not None:
        flags = ("study", *MODEL_FLAGS, *TRAIN_FLAGS, "set_")
        others = [f for f in flags if f in flags_given(context) and f != "epochs"]
        if others:
            raise SretError(
                f"--resume goes on with what {resume}/config.json says; leave out "
                f"{', '.join(others)}",
                USAGE,
            )
        run = continued(resume, epochs)
        found, runs = Study(run.study, (run,)), resume.parent.parent
    else:
        found = study_from(context, trains=True)
    if all(run.train is None for run in found.runs):
        raise SretError(f"{study} trains nothing: it has no [train]; use `sret profile`")
    options = Options(
        *(device, workers),
        gpu_memory=gpu_memory_of(gpu_memory),
        checkpoint_every_steps=checkpoint_every_steps,
        checkpoint_minutes=checkpoint_minutes,
        tensorboard=tensorboard,
        shard=shard,
    )
    outcome = run_study(found, runs, options, notes())
    show_rows(outcome.rows, report.RUN_TABLE, json_)
    for run in found.runs if len(found.runs) == 1 else ():
        notes().print(f"kept in {run.directory(runs)}")
    finish(outcome.failed)


def run(
    context: typer.Context,
    study: StudyFile = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    workers: Workers = None,
    gpu_memory: GpuMemory = None,
    checkpoint_every_steps: EverySteps = None,
    checkpoint_minutes: Minutes = 10.0,
    tensorboard: Tensorboard = False,
    shard: Shard = False,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; beside the rows if not given.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Profile, train and report a study in one; what is there already is not done again."""
    from sret_cli.launch import Options, run_study
    from sret_cli.records import make_directory

    check_device(device)
    found = study_from(context, trains=True)
    if out is not None:
        make_directory(out)
    options = Options(
        *(device, workers),
        gpu_memory=gpu_memory_of(gpu_memory),
        checkpoint_every_steps=checkpoint_every_steps,
        checkpoint_minutes=checkpoint_minutes,
        tensorboard=tensorboard,
        shard=shard,
    )
    outcome = run_study(found, runs, options, notes())
    where = runs / found.name
    write_report(where, found.report, out or where / "report", json_)
    finish(outcome.failed)
