"""The command that stores a teacher's soft labels."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import check_device, study_from
from sret_cli.commands.flags import (
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


def distill_labels(
    context: typer.Context,
    study: StudyFile = None,
    teacher: Annotated[
        str | None, typer.Option(help="A model of timm's, or a directory of a trained one.")
    ] = None,
    teacher_checkpoint: Annotated[
        str | None, typer.Option(help="A file of weights for timm's model.")
    ] = None,
    teacher_img_size: Annotated[
        int | None, typer.Option(help="What it was trained on, where timm says otherwise.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the probabilities; the study's, or 1.")
    ] = None,
    crops: Annotated[int, typer.Option(min=1, help="Of each image; epochs take turns.")] = 10,
    top_k: Annotated[int, typer.Option(min=1, help="Classes stored of each crop.")] = 10,
    out: Annotated[
        Path | None, typer.Option(help="A directory; the study's train.soft_labels.")
    ] = None,
    preset: Preset = None,
    backbone: Backbone = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    on_bad_image: OnBadImage = None,
    seed: Seed = None,
    precision: Precision = None,
    set_: Set = None,
    crops_a_step: Annotated[
        int, typer.Option("--batch-size", min=1, help="Crops that the teacher takes at a time.")
    ] = 256,
    device: Device = "auto",
    workers: Workers = None,
    json_: Json = False,
) -> None:
    """Store what a teacher says of crops of the training images, for train.soft_labels.

    Images, crops and flips are those of the study's first training, or of the flags. Their size is
    told first, and that for ImageNet. What was interrupted goes on; training needs no teacher then.
    """
    from sret_cli.commands.arguments import parse_setting
    from sret_cli.runtime.progress import Display
    from sret_cli.spec.options import RunOptions
    from sret_cli.training.label_writer import write_labels

    check_device(device)
    if teacher is None:
        raise SretError("name the model that is to teach by --teacher", USAGE)
    flags: dict[str, Any] = {
        "teacher": teacher,
        "teacher_checkpoint": teacher_checkpoint,
        "soft_labels": out,
    }
    flags |= {"teacher_img_size": teacher_img_size, "distill_temperature": temperature}
    for table, field, value in map(parse_setting, set_ or []):
        if table == "train" and flags.get(field) is not None:
            raise SretError(
                f"--set train.{field}={value} is the second value of train.{field}, after "
                f"{str(flags[field])!r}; leave one of the two out",
                USAGE,
            )
    run = next((r for r in study_from(context, trains=True).runs if r.train is not None), None)
    if run is None:
        raise SretError(f"{study} trains nothing: it has no [train]", USAGE)
    directory = out or run.train.soft_labels
    if directory is None:
        raise SretError("say where to write the labels by --out", USAGE)
    if temperature is None:
        temperature = run.train.distill_temperature
    train = run.train.with_values(
        teacher=teacher,
        teacher_checkpoint=teacher_checkpoint,
        teacher_img_size=teacher_img_size,
        soft_labels=None,
        distill_temperature=temperature,
    )
    display = Display(stderr_console(), f"label {train.dataset}", 1)
    with display.showing() as progress:
        spec = write_labels(
            train,
            run.model,
            Path(directory),
            crops=crops,
            top_k=top_k,
            batch_size=crops_a_step,
            options=RunOptions(device=device, workers=workers),
            progress=progress,
        )
    if json_:
        return print_json(spec.model_dump(mode="json"))
    print(f"{directory}: {spec.images:,} images, {spec.crops} crops, {spec.size_bytes():,} bytes")
