"""`sret export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import flags_given, study_from
from sret_cli.commands.completion import choices
from sret_cli.commands.flags import MODEL, MODEL_FLAGS, Json, Runs, with_flags
from sret_cli.commands.output import print_json, run_or_newest, stderr_console
from sret_cli.runtime.errors import USAGE, SretError


@with_flags(MODEL)
def export(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A run, or what `sret build --out` wrote."),
    ] = None,
    *,
    to: Annotated[
        str,
        typer.Option(
            help="safetensors, torch-export or onnx.",
            autocompletion=choices("safetensors", "torch-export", "onnx"),
        ),
    ] = "safetensors",
    seed: Annotated[int, typer.Option(help="Of the weights, where flags say the model.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A new directory; exports/NAME-RUN-FORMAT if not given.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    **_: Any,
) -> None:
    """Write a model as safetensors, torch.export or ONNX, check its logits, add a model card.

    DIR is the newest run if not given; with flags it is an untrained model. The shared weights
    stand once in the file, whatever the depth.
    """
    import torch

    from sret_cli.model.kinds import build_any
    from sret_cli.report.card import model_card
    from sret_cli.spec.run import run_directory
    from sret_cli.study.rows import read_row
    from sret_cli.weights.export import check_export, export_model
    from sret_cli.weights.origin import Origin, read_origin
    from sret_cli.weights.store import load_model

    flags = [f for f in (*MODEL_FLAGS, "set_") if f in flags_given(context)]
    if directory is not None and flags:
        raise SretError(f"{directory} is a whole model; leave out {', '.join(flags)}", USAGE)
    if flags:
        run = study_from(context, trains=False).runs[0]
        torch.manual_seed(seed)
        model, origin = build_any(run.model), Origin(run.name)
    else:
        directory = run_or_newest(directory, runs)
        model = load_model(directory)
        origin = read_origin(directory, model.spec, read_row(run_directory(directory)))
    out = out or Path("exports") / f"{origin.directory_name}-{to}"
    check_export(to, out)
    with stderr_console().status(f"exporting {origin.name} to {to}", spinner="line"):
        written = export_model(
            model, to, out, origin, card=lambda written: model_card(model, to, written, origin)
        )
    if json_:
        return print_json({**vars(written), "file": str(written.file)})
    print(written)
    stderr_console().print(f"wrote {out}/README.md, the model card")
