"""The commands that train: `train` and `run`."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import flags_given, study_from, training_options
from sret_cli.commands.flags import (
    MODEL,
    MODEL_FLAGS,
    TRAIN_FLAGS,
    TRAINING,
    BatchSize,
    Compile,
    DataDir,
    Dataset,
    Epochs,
    Json,
    LearningRate,
    OnBadImage,
    Precision,
    Recipe,
    Recompute,
    Runs,
    Seed,
    Set,
    StudyFile,
    Synthetic,
    WeightDecay,
    with_flags,
)
from sret_cli.commands.output import exit_if_failed, print_rows, stderr_console
from sret_cli.commands.report import write_report
from sret_cli.runtime.errors import USAGE, SretError


@with_flags({**MODEL, **TRAINING})
def train(
    context: typer.Context,
    study: StudyFile = None,
    *,
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
        Path | None, typer.Option(help="Go on with that run, or with --epochs from its end.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    **_: Any,
) -> None:
    """Train the runs of a study that are missing, or one model: by default `nano` on `digits`.

    A run that was interrupted goes on from its newest checkpoint.
    """
    from sret_cli.commands.arguments import parse_setting
    from sret_cli.report.tables import RUN_TABLE
    from sret_cli.spec.contents import CONTENTS_OF
    from sret_cli.study.engine import run_study
    from sret_cli.study.file import Study
    from sret_cli.study.resolve import continue_run

    options = training_options(context)
    if resume is not None:
        given = flags_given(context)
        settings = [parse_setting(text) for text in given.get("set_", ())]
        places = {key: value for _, key, value in settings if key in CONTENTS_OF}
        places |= {key: given[key] for key in ("dataset", "data_dir") if key in given}
        may_differ = ("epochs", "on_bad_image", "dataset", "data_dir")
        flags = ("study", *MODEL_FLAGS, *TRAIN_FLAGS, "compile_", "recompute")
        others = [name.strip("_") for name in flags if name in given and name not in may_differ]
        others += [f"{table}.{key}" for table, key, _ in settings if key not in CONTENTS_OF]
        others += ["synthetic"] if synthetic else []
        if others:
            raise SretError(
                f"--resume goes on with what {resume}/config.json says; leave out "
                f"{', '.join(others)}",
                USAGE,
            )
        run = continue_run(resume, epochs, on_bad_image, places)
        found, runs = Study(run.study, (run,)), Path(os.path.abspath(resume)).parent.parent
    else:
        found = study_from(context, trains=True)
    if all(run.train is None for run in found.runs):
        raise SretError(f"{study} trains nothing: it has no [train]; use `sret profile`")
    outcome = run_study(found, runs, options, stderr_console())
    print_rows(outcome.rows, RUN_TABLE, json_)
    for row in outcome.rows if len(outcome.rows) == 1 else ():
        stderr_console().print(f"kept in {runs / row['study'] / row['run_id']}")
    exit_if_failed(outcome.failed)


@with_flags({"set_": Set, **TRAINING})
def run(
    context: typer.Context,
    study: StudyFile = None,
    *,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; beside the rows if not given.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    **_: Any,
) -> None:
    """Profile, train and report a study in one; what is there already is not done again."""
    from sret_cli.runtime.files import make_directory
    from sret_cli.study.engine import run_study

    options = training_options(context)
    found = study_from(context, trains=True)
    if out is not None:
        make_directory(out)
    outcome = run_study(found, runs, options, stderr_console())
    where = runs / found.name
    write_report(where, found.report, out or where / "report", json_)
    exit_if_failed(outcome.failed)
