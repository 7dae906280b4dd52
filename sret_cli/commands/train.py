"""`sret train` and `sret run`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import (
    engine_options,
    flags_given,
    only_runs,
    parse_setting,
    study_from,
    training_options,
)
from sret_cli.commands.flags import (
    MODEL_FLAGS,
    TRAIN_FLAGS,
    WHERE,
    Address,
    Backbone,
    BatchSize,
    CheckpointEverySteps,
    CheckpointMinutes,
    Compile,
    DataDir,
    Dataset,
    Device,
    DryRun,
    EngineName,
    Epochs,
    FailFast,
    GpuMemory,
    GpusPerRun,
    ImgSize,
    Jobs,
    Json,
    LaterSlices,
    Layers,
    LearningRate,
    Macs,
    MaxRuns,
    Nll,
    NumClasses,
    OnBadImage,
    Only,
    Params,
    Precision,
    Preset,
    Recipe,
    Recompute,
    Recursions,
    ReportOut,
    Retries,
    Retry,
    Runs,
    RunsPerGpu,
    Seed,
    Set,
    Shard,
    Share,
    Slices,
    Slurm,
    StudyFile,
    Synthetic,
    Tensorboard,
    Twin,
    Wait,
    WeightDecay,
    Workers,
)
from sret_cli.commands.forecast import show_forecast
from sret_cli.commands.output import exit_if_failed, print_rows, stderr_console
from sret_cli.commands.report import report_study
from sret_cli.runtime.errors import USAGE, SretError

MAY_CHANGE = ("epochs", "on_bad_image", "dataset", "data_dir")  # flags that go with --resume


def train(
    context: typer.Context,
    study: StudyFile = None,
    *,
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
    recipe: Recipe = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    weight_decay: WeightDecay = None,
    seed: Seed = None,
    precision: Precision = None,
    compile_: Compile = None,
    recompute: Recompute = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Resume the run in this directory; with --epochs, train it longer.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    runs: Runs = Path("runs"),
    device: Device = "auto",
    workers: Workers = None,
    gpu_memory: GpuMemory = None,
    checkpoint_every_steps: CheckpointEverySteps = None,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    tensorboard: Tensorboard = False,
    shard: Shard = False,
    jobs: Jobs = "1",
    gpus_per_run: GpusPerRun = 1,
    runs_per_gpu: RunsPerGpu = 1,
    retries: Retries = 2,
    retry: Retry = None,
    only: Only = None,
    fail_fast: FailFast = False,
    max_runs: MaxRuns = None,
    dry_run: DryRun = False,
    engine: EngineName = "local",
    address: Address = None,
    slurm: Slurm = None,
    wait: Wait = False,
    json_: Json = False,
) -> None:
    """Train the missing runs of a study, or one model: by default `nano` on `digits`.

    A run that was interrupted resumes from its newest checkpoint.
    """
    from sret_cli.report.tables import RUN_TABLE
    from sret_cli.study.engines import do_study

    options = training_options(context)
    if resume is None:
        found = study_from(context, trains=True)
    else:
        found, runs = resumed_study(context, resume), Path(os.path.abspath(resume)).parent.parent
    if all(run.train is None for run in found.runs):
        raise SretError(f"{study} trains nothing: it has no [train]; use `sret profile`")
    found = only_runs(found, only)
    if dry_run:
        return show_forecast(found, runs, options, engine_options(context), json_)
    outcome = do_study(found, runs, options, engine_options(context), stderr_console())
    if outcome.is_submitted:
        return
    print_rows(outcome.rows, RUN_TABLE, json_)
    if len(outcome.rows) == 1:
        row = outcome.rows[0]
        stderr_console().print(f"kept in {runs / row['study'] / row['run_id']}")
    exit_if_failed(outcome.failed)


def resumed_study(context: typer.Context, directory: Path) -> Any:
    """The study of the one run in a directory, as its `config.json` and a few flags say.

    Raises:
        SretError: a flag was given that would change the run, or the run cannot be resumed.
    """
    from sret_cli.spec.contents import CONTENTS_OF
    from sret_cli.study.file import Study
    from sret_cli.study.resolve import continue_run

    given = flags_given(context)
    settings = [parse_setting(text) for text in given.get("set_", ())]
    flags = ("study", *MODEL_FLAGS, *TRAIN_FLAGS, "compile_", "recompute")
    others = [name.strip("_") for name in flags if name in given and name not in MAY_CHANGE]
    others += [f"{table}.{key}" for table, key, _ in settings if key not in CONTENTS_OF]
    others += ["synthetic"] if given["synthetic"] else []
    if others:
        raise SretError(
            f"--resume trains what {directory}/config.json says; leave out {', '.join(others)}",
            USAGE,
        )
    places = {key: value for _, key, value in settings}
    places |= {key: given[key] for key in ("dataset", "data_dir") if key in given}
    run = continue_run(directory, given.get("epochs"), given.get("on_bad_image"), places)
    return Study(run.study, (run,))


def run(
    context: typer.Context,
    study: StudyFile = None,
    *,
    set_: Set = None,
    data_dir: DataDir = None,
    out: ReportOut = None,
    runs: Runs = Path("runs"),
    device: Device = "auto",
    workers: Workers = None,
    gpu_memory: GpuMemory = None,
    checkpoint_every_steps: CheckpointEverySteps = None,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    tensorboard: Tensorboard = False,
    shard: Shard = False,
    jobs: Jobs = "1",
    gpus_per_run: GpusPerRun = 1,
    runs_per_gpu: RunsPerGpu = 1,
    retries: Retries = 2,
    retry: Retry = None,
    only: Only = None,
    fail_fast: FailFast = False,
    max_runs: MaxRuns = None,
    dry_run: DryRun = False,
    engine: EngineName = "local",
    address: Address = None,
    slurm: Slurm = None,
    wait: Wait = False,
    json_: Json = False,
) -> None:
    """Profile, train and report a study in one go; finished runs are not repeated."""
    from sret_cli.runtime.files import make_directory
    from sret_cli.study.engines import do_study

    options = training_options(context)
    found = study_from(context, trains=True)
    if out is not None:
        make_directory(out)
    found = only_runs(found, only)
    if dry_run:
        return show_forecast(found, runs, options, engine_options(context), json_)
    outcome = do_study(found, runs, options, engine_options(context), stderr_console())
    if outcome.is_submitted:
        return
    if outcome.rows:
        report_study(found, outcome.rows, runs, out, json_)
    exit_if_failed(outcome.failed)
