"""The commands about weights: evaluate, convert and export them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.completion import presets
from sret_cli.commands.flags import (
    Json,
    LaterSlices,
    Set,
    Slices,
)
from sret_cli.commands.output import print_rows, stderr_console
from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.weights.store import refuse_backbone


def refuse_other_file(path: Path, header: str) -> None:
    """Makes sure that a CSV can be written: only one with the same header is replaced.

    Raises:
        SretError: the path is no `.csv`, its directory cannot be written to, or it is another file.
    """
    from sret_cli.runtime.files import make_directory

    if path.suffix != ".csv":
        raise SretError(f"--out {path}: name a file that ends in .csv", USAGE)
    make_directory(path.parent)
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline(10_000).rstrip("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise SretError(
            f"cannot read {path}: {error.strerror}; choose another --out", USAGE
        ) from None
    if first != header:
        raise SretError(f"{path} is another file; choose another --out", USAGE)


def convert(
    file: Annotated[
        Path,
        typer.Argument(help="A .pth, .pt, .ckpt, .bin, .tar or .safetensors file (reference)."),
    ],
    out: Annotated[Path, typer.Option(help="Write config.json and model.safetensors there.")],
    preset: Annotated[
        str | None,
        typer.Option(help="The design, if not to be recognised.", autocompletion=presets),
    ] = None,
    slices: Slices = None,
    recursive_slices: LaterSlices = None,
    img_size: Annotated[
        int | None, typer.Option(help="Resample the position embeddings for these images.")
    ] = None,
    reset_head: Annotated[
        bool, typer.Option("--reset-head", help="A fresh head, with --num-classes.")
    ] = False,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the fresh head.")] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="The averaged weights, where FILE has plain ones, too.")
    ] = False,
    set_: Set = None,
    to_reference: Annotated[
        bool, typer.Option("--to-reference", help="Read our directory FILE, and write model.pth.")
    ] = False,
    json_: Json = False,
) -> None:
    """Read a checkpoint of the reference and write ours, or with --to-reference the other way.

    Nothing in a checkpoint is executed: one that would do more than hold tensors is refused.
    """
    import torch

    from sret_cli.commands.arguments import model_settings
    from sret_cli.runtime.files import sha256
    from sret_cli.weights.convert import read_reference, save_reference
    from sret_cli.weights.store import load_model, save_model

    given = {"slices": slices, "recursive_slices": recursive_slices}
    given |= {"img_size": img_size, "num_classes": num_classes}
    flags = {key: value for key, value in given.items() if value is not None}
    changes = model_settings(set_ or [], flags)
    if to_reference:
        if changes or preset or reset_head or ema:
            raise SretError("--to-reference writes a model as it is; leave out the rest", USAGE)
        model, name = load_model(file), file.name
        refuse_backbone(model)
        stderr_console().print(f"wrote {save_reference(model, out)}")
    else:
        torch.manual_seed(0)  # of a fresh head
        found = read_reference(file, preset, changes, reset_head, ema)
        model, name = found.model, found.name
        source: dict[str, Any] = {"file": file.name, "sha256": sha256(file)}
        source |= {"weights": found.place, "averaged": found.averaged}
        save_model(model, out, {"name": name, "source": source})
        for remark in (*found.notes, f"wrote {out}/config.json and {out}/model.safetensors"):
            stderr_console().print(remark)
    params = sum(p.numel() for p in model.parameters())
    row = {"name": name, "layers": model.spec.layers, "params": params}
    row |= {f"model.{key}": value for key, value in model.spec.model_dump(mode="json").items()}
    print_rows([row], ("layers", "params"), json_)
