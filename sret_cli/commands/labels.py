"""`sret distill-labels`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import (
    check_device,
    parse_setting,
    second_value_error,
    study_from,
)
from sret_cli.commands.flags import (
    TRAINING,
    WHERE,
    Backbone,
    DataDir,
    Dataset,
    Device,
    ImgSize,
    Json,
    NumClasses,
    OnBadImage,
    Precision,
    Preset,
    Seed,
    Set,
    StudyFile,
    Workers,
)
from sret_cli.commands.output import print_json, stderr_console
from sret_cli.runtime.errors import USAGE, SretError

# Parameters of the command that are fields of `[train]` under another name.
FIELD_OF = {
    "teacher": "teacher",
    "teacher_checkpoint": "teacher_checkpoint",
    "teacher_img_size": "teacher_img_size",
    "temperature": "distill_temperature",
    "out": "soft_labels",
}


def distill_labels(
    context: typer.Context,
    study: StudyFile = None,
    *,
    preset: Preset = None,
    backbone: Backbone = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    set_: Set = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    on_bad_image: OnBadImage = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Name of a timm model, or directory of a trained model.", rich_help_panel=TRAINING
        ),
    ] = None,
    teacher_checkpoint: Annotated[
        str | None,
        typer.Option(help="File with the weights of a timm teacher.", rich_help_panel=TRAINING),
    ] = None,
    teacher_img_size: Annotated[
        int | None,
        typer.Option(
            help="Image size of the teacher, if not timm's default.", rich_help_panel=TRAINING
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Temperature of the probabilities; the study's, or 1.", rich_help_panel=TRAINING
        ),
    ] = None,
    crops: Annotated[
        int,
        typer.Option(
            metavar="<int>",
            min=1,
            help="Crops of each image; epochs use them in turn.",
            rich_help_panel=TRAINING,
        ),
    ] = 10,
    top_k: Annotated[
        int,
        typer.Option(
            metavar="<int>",
            min=1,
            help="Most probable classes to store for each crop.",
            rich_help_panel=TRAINING,
        ),
    ] = 10,
    seed: Seed = None,
    precision: Precision = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory to write; the study's train.soft_labels if not given.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    crops_a_step: Annotated[
        int,
        typer.Option(
            "--batch-size",
            metavar="<int>",
            min=1,
            help="Crops that the teacher takes at a time.",
            rich_help_panel=WHERE,
        ),
    ] = 256,
    device: Device = "auto",
    workers: Workers = None,
    json_: Json = False,
) -> None:
    """Store a teacher's probabilities for crops of the training images, for train.soft_labels.

    Images, crops and flips are those of the study's first run that trains, or of the flags. The
    size of the labels is printed first, also for ImageNet. An interrupted command resumes.
    Training with stored labels needs no teacher.
    """
    from sret_cli.runtime.progress import Display
    from sret_cli.spec.options import RunOptions
    from sret_cli.training.label_writer import write_labels

    check_device(device)
    run, train, directory = labelled_training(context)
    with Display(stderr_console(), f"label {train.dataset}", 1).showing() as progress:
        spec = write_labels(
            train,
            run.model,
            directory,
            crops=crops,
            top_k=top_k,
            batch_size=crops_a_step,
            options=RunOptions(device=device, workers=workers),
            progress=progress,
        )
    if json_:
        return print_json(spec.model_dump(mode="json"))
    print(f"{directory}: {spec.images:,} images, {spec.crops} crops, {spec.size_bytes():,} bytes")


def labelled_training(context: typer.Context) -> tuple[Any, Any, Path]:
    """The run whose images are labelled, its training with the teacher, and where labels go.

    Raises:
        SretError: no teacher or directory is given, a field has two values, or no run trains.
    """
    flags = context.params
    if flags["teacher"] is None:
        raise SretError("no teacher is given; name a model with --teacher", USAGE)
    refuse_second_values(flags)
    runs = study_from(context, trains=True).runs
    run = next((run for run in runs if run.train is not None), None)
    if run is None or run.train is None:
        raise SretError(f"{flags['study']} trains nothing: it has no [train]", USAGE)
    directory = flags["out"] or run.train.soft_labels
    if directory is None:
        raise SretError("no directory is given for the labels; name one with --out", USAGE)
    temperature = flags["temperature"]
    train = run.train.with_values(
        teacher=flags["teacher"],
        teacher_checkpoint=flags["teacher_checkpoint"],
        teacher_img_size=flags["teacher_img_size"],
        soft_labels=None,
        distill_temperature=run.train.distill_temperature if temperature is None else temperature,
    )
    return run, train, Path(directory)


def refuse_second_values(flags: dict[str, Any]) -> None:
    """Raises if `--set` gives a field a value that a flag of this command has given already."""
    given = {field: flags[name] for name, field in FIELD_OF.items() if flags[name] is not None}
    for table, field, value in map(parse_setting, flags["set_"] or []):
        if table == "train" and field in given:
            raise second_value_error(table, field, value, str(given[field]))
