"""`sret build`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import model_flags_given, study_from
from sret_cli.commands.flags import (
    MODEL,
    WHERE,
    Backbone,
    DataDir,
    ImgSize,
    Json,
    LaterSlices,
    Layers,
    Macs,
    Nll,
    NumClasses,
    Params,
    Preset,
    Recursions,
    Set,
    Share,
    Slices,
    StudyFile,
    Twin,
)
from sret_cli.commands.output import Output, print_json, stderr_console
from sret_cli.runtime.errors import USAGE, SretError


def build(
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
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Read the model in this directory.", rich_help_panel=MODEL),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="<int>",
            min=0,
            max=2**32,
            help="Random seed for the weights and the image.",
            rich_help_panel=MODEL,
        ),
    ] = 0,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write config.json and model.safetensors to this directory.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Build a model, run one image through it, and print its stages."""
    import torch

    from sret_cli.model.summary import summarise
    from sret_cli.report.stages import stage_table
    from sret_cli.weights.store import check_no_model, save_model

    flags = model_flags_given(context)
    if from_ is not None and (study is not None or flags):
        given = ", ".join(["study"] * (study is not None) + flags)
        raise SretError(f"--from reads a whole model; leave out {given}", USAGE)
    if out is not None:
        check_no_model(out)
    torch.manual_seed(seed)
    models = build_models(context)
    summaries = [summarise(model) for model in models]
    if out is not None:
        save_model(models[0], out)
        stderr_console().print(f"wrote {out}/config.json and {out}/model.safetensors")
    if json_:
        return print_json(summaries if len(summaries) > 1 else summaries[0])
    for summary in summaries:
        Output().print(stage_table(summary))


def build_models(context: typer.Context) -> list[Any]:
    """The model of `--from`, or those that a study or flags describe, each one once."""
    from sret_cli.model.kinds import build_any
    from sret_cli.weights.store import load_model

    flags = context.params
    if flags["from_"] is not None:
        return [load_model(flags["from_"])]
    specs = dict.fromkeys(run.model for run in study_from(context, trains=False).runs)
    if flags["out"] is not None and len(specs) > 1:
        raise SretError(f"--out takes one model, and {flags['study']} has {len(specs)}", USAGE)
    return [build_any(spec) for spec in specs]
