"""`sret convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import model_settings
from sret_cli.commands.completion import presets
from sret_cli.commands.flags import MODEL, WHERE, Json, LaterSlices, Set, Slices
from sret_cli.commands.output import print_rows, stderr_console
from sret_cli.runtime.errors import USAGE, SretError

CHANGES = ("slices", "recursive_slices", "img_size", "num_classes")  # flags that change the model


def convert(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A .pth, .pt, .ckpt, .bin, .tar or .safetensors file of the reference.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Write config.json and model.safetensors to this directory.",
            rich_help_panel=WHERE,
        ),
    ],
    *,
    preset: Annotated[
        str | None,
        typer.Option(
            help="The model's design, if it is not recognised.",
            autocompletion=presets,
            rich_help_panel=MODEL,
        ),
    ] = None,
    slices: Slices = None,
    recursive_slices: LaterSlices = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            help="Resample the position embeddings for this image size.", rich_help_panel=MODEL
        ),
    ] = None,
    reset_head: Annotated[
        bool,
        typer.Option(
            "--reset-head", help="Make a new head, with --num-classes.", rich_help_panel=MODEL
        ),
    ] = False,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes of the new head.", rich_help_panel=MODEL)
    ] = None,
    ema: Annotated[
        bool,
        typer.Option(
            "--ema",
            help="Take the averaged weights, if FILE has both kinds.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    set_: Set = None,
    to_reference: Annotated[
        bool,
        typer.Option(
            "--to-reference",
            help="Convert our directory FILE to model.pth instead.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Convert a checkpoint of the reference to ours, or with --to-reference the other way.

    Nothing in a checkpoint is executed: one that would run code when it is read is refused.
    """
    from sret_cli.model.sret import parameter_count

    changes = {key: context.params[key] for key in CHANGES if context.params[key] is not None}
    changes = model_settings(set_ or [], changes)
    if not to_reference:
        model, name = convert_from_reference(context, changes)
    elif changes or preset or reset_head or ema:
        raise SretError("--to-reference writes a model as it is; leave out the rest", USAGE)
    else:
        model, name = convert_to_reference(file, out), file.name
    params = parameter_count(model)
    row = {"name": name, "layers": model.spec.layers, "params": params}
    row |= {f"model.{key}": value for key, value in model.spec.model_dump(mode="json").items()}
    print_rows([row], ("layers", "params"), json_)


def convert_from_reference(context: typer.Context, changes: dict[str, Any]) -> tuple[Any, str]:
    """Writes the model of a reference checkpoint as ours; returns the model and its name.

    Args:
        context: the command's.
        changes: fields of the model that differ from its preset's.
    """
    import torch

    from sret_cli.runtime.files import sha256
    from sret_cli.weights.convert import read_reference
    from sret_cli.weights.store import save_model

    flags = context.params
    file, out = flags["file"], flags["out"]
    torch.manual_seed(0)  # for a new head
    found = read_reference(file, flags["preset"], changes, flags["reset_head"], flags["ema"])
    source: dict[str, Any] = {
        "file": file.name,
        "sha256": sha256(file),
        "weights": found.place,
        "averaged": found.averaged,
    }
    save_model(found.model, out, {"name": found.name, "source": source})
    for remark in (*found.notes, f"wrote {out}/config.json and {out}/model.safetensors"):
        stderr_console().print(remark)
    return found.model, found.name


def convert_to_reference(directory: Path, out: Path) -> Any:
    """Writes our model in a directory as the reference's `model.pth`; returns the model."""
    from sret_cli.weights.convert import save_reference
    from sret_cli.weights.store import load_model, refuse_backbone

    model = load_model(directory)
    refuse_backbone(model)
    stderr_console().print(f"wrote {save_reference(model, out)}")
    return model
