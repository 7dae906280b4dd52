"""`sret export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import model_flags_given, study_from
from sret_cli.commands.completion import choices
from sret_cli.commands.flags import (
    MODEL,
    WHERE,
    Backbone,
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
    Runs,
    Set,
    Share,
    Slices,
    Twin,
)
from sret_cli.commands.output import print_json, run_or_newest, stderr_console
from sret_cli.runtime.errors import USAGE, SretError


def export(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A run, or what `sret build --out` wrote."),
    ] = None,
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
    seed: Annotated[
        int,
        typer.Option(
            help="Random seed for the weights of a model that flags describe.",
            rich_help_panel=MODEL,
        ),
    ] = 0,
    to: Annotated[
        str,
        typer.Option(
            help="safetensors, torch-export or onnx.",
            autocompletion=choices("safetensors", "torch-export", "onnx"),
            rich_help_panel=WHERE,
        ),
    ] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new directory; exports/NAME-RUN-FORMAT if not given.", rich_help_panel=WHERE
        ),
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Write a model as safetensors, torch.export or ONNX, check its logits, add a model card.

    Without DIR it is the newest run, or with flags of the section Model an untrained model. The
    file holds shared weights once, at any depth.
    """
    from sret_cli.cost.trace import known_costs
    from sret_cli.report.card import model_card
    from sret_cli.weights.export import check_export, export_model

    model, origin = exported_model(context)
    out = out or Path("exports") / f"{origin.directory_name}-{to}"
    check_export(to, out)
    with stderr_console().status(f"exporting {origin.name} to {to}", spinner="line"):
        written = export_model(
            model,
            to,
            out,
            origin,
            card=lambda written: model_card(model.spec, known_costs(model), to, written, origin),
        )
    if json_:
        return print_json({**vars(written), "file": str(written.file)})
    print(written)
    stderr_console().print(f"wrote {out}/README.md, the model card")


def exported_model(context: typer.Context) -> tuple[Any, Any]:
    """The model to export and its `Origin`: of a directory, or untrained by flags.

    Raises:
        SretError: both were given, or the directory has no model.
    """
    import torch

    from sret_cli.model.kinds import build_any
    from sret_cli.spec.run import run_directory
    from sret_cli.study.rows import read_row
    from sret_cli.weights.origin import Origin, read_origin
    from sret_cli.weights.store import load_model

    directory, flags = context.params["directory"], model_flags_given(context)
    if directory is not None and flags:
        raise SretError(f"{directory} is a whole model; leave out {', '.join(flags)}", USAGE)
    if flags:
        run = study_from(context, trains=False).runs[0]
        torch.manual_seed(context.params["seed"])
        return build_any(run.model), Origin(run.name)
    directory = run_or_newest(directory, context.params["runs"])
    model = load_model(directory)
    return model, read_origin(directory, model.spec, read_row(run_directory(directory)))
