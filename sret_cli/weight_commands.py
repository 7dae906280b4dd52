"""The commands about weights: evaluate, convert and export them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.completion import PRECISIONS, choices, datasets, presets
from sret_cli.errors import USAGE, SretError
from sret_cli.flags import (
    MODEL,
    MODEL_FLAGS,
    Device,
    Json,
    LaterSlices,
    Output,
    Runs,
    Set,
    Slices,
    Workers,
    check_device,
    flags_given,
    notes,
    print_json,
    run_or_newest,
    show_rows,
    study_from,
    takes,
)


def evaluate(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run's directory; the newest if not given."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="A folder with val/ or test/, and the classes of the model."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Its kind, where it is no folder: tar, hfds, wds …", autocompletion=datasets
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="The column of classes, where hfds or wds have several.")
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Of the images; position embeddings are resampled.")
    ] = None,
    slices: Slices = None,
    recursive_slices: LaterSlices = None,
    recursions: Annotated[
        str | None, typer.Option(metavar="1,2,4", help="Run the same blocks so often instead.")
    ] = None,
    reference_shuffle: Annotated[
        int | None,
        typer.Option(
            metavar="SEED", help="Draw as the reference did: depends on batches and order."
        ),
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Top-1 of each class.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="CSV", help="A file for the top-1 of each class.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 256,
    precision: Annotated[
        str, typer.Option(help="fp32 or bf16.", autocompletion=PRECISIONS)
    ] = "fp32",
    device: Device = "auto",
    workers: Workers = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Evaluate a run, or a converted model, on test images; twice the same is bitwise the same."""
    from sret_cli import report
    from sret_cli.evaluate import evaluate_run
    from sret_cli.progress import Display
    from sret_cli.records import make_directory, write_atomically

    check_device(device)
    if out is not None:
        refuse_other_file(out, ",".join(report.CLASS_COLUMNS))
    directory = run_or_newest(directory, runs)
    given = {"img_size": img_size, "slices": slices, "recursive_slices": recursive_slices}
    changes = {key: value for key, value in given.items() if value is not None}
    counts = recursion_counts(recursions)
    with Display(notes(), f"evaluate {directory}", 1).showing() as on_step:
        rows = [
            evaluate_run(
                *(directory, data_dir, batch_size, precision, device, workers, changes),
                *(reference_shuffle, on_step, count, dataset, label_column),
            )
            for count in counts
        ]
    notes().print(f"evaluated {directory} on {rows[0]['device_name']}")
    show_rows(rows, report.EVAL_TABLE, json_)
    for row in rows if per_class and not json_ else ():
        Output().print(report.class_table(row))
    if out is not None:
        write_atomically(out, report.class_csv(rows))
        notes().print(f"wrote {out}")
    if len(rows) > 1:
        from sret_cli.figures import plot, save_figure

        figure = plot(rows, "layers", ["top1_percent", "test_loss"])
        stem = make_directory(directory / "report") / "recursions"
        files = save_figure(figure, stem)
        notes().print(f"wrote {', '.join(map(str, files))}")


def refuse_other_file(path: Path, header: str) -> None:
    """Makes sure that a CSV can be written: only one with the same header is replaced.

    Raises:
        SretError: the path is no `.csv`, its directory cannot be written to, or it is another file.
    """
    from sret_cli.records import make_directory

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


def recursion_counts(text: str | None) -> list[int | None]:
    """The numbers of a text such as "1,2,4"; None alone, the model's own, where there is none."""
    if text is None:
        return [None]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise SretError(f"--recursions {text}: write whole numbers from 1, as in 1,2,4,8", USAGE)
    return list(dict.fromkeys(counts))


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

    from sret_cli.study import model_settings
    from sret_cli.weights import load_model, read_reference, save_model, save_reference, sha256

    given = {"slices": slices, "recursive_slices": recursive_slices}
    given |= {"img_size": img_size, "num_classes": num_classes}
    flags = {key: value for key, value in given.items() if value is not None}
    changes = model_settings(set_ or [], flags)
    if to_reference:
        if changes or preset or reset_head or ema:
            raise SretError("--to-reference writes a model as it is; leave out the rest", USAGE)
        model, name = load_model(file), file.name
        refuse_backbone(model)
        notes().print(f"wrote {save_reference(model, out)}")
    else:
        torch.manual_seed(0)  # of a fresh head
        found = read_reference(file, preset, changes, reset_head, ema)
        model, name = found.model, found.name
        source: dict[str, Any] = {"file": file.name, "sha256": sha256(file)}
        source |= {"weights": found.place, "averaged": found.averaged}
        save_model(model, out, {"name": name, "source": source})
        for remark in (*found.notes, f"wrote {out}/config.json and {out}/model.safetensors"):
            notes().print(remark)
    params = sum(p.numel() for p in model.parameters())
    row = {"name": name, "layers": model.spec.layers, "params": params}
    row |= {f"model.{key}": value for key, value in model.spec.model_dump(mode="json").items()}
    show_rows([row], ("layers", "params"), json_)


@takes(MODEL)
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

    from sret_cli.export import check_export, export_model
    from sret_cli.origin import Origin, read_origin
    from sret_cli.recurse import build_any
    from sret_cli.weights import load_model

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
        origin = read_origin(directory, model.spec)
    out = out or Path("exports") / f"{origin.directory_name}-{to}"
    check_export(to, out)
    with notes().status(f"exporting {origin.name} to {to}", spinner="line"):
        written = export_model(model, to, out, origin)
    if json_:
        return print_json({**vars(written), "file": str(written.file)})
    print(written)
    notes().print(f"wrote {out}/README.md, the model card")


def refuse_backbone(model: Any) -> None:
    """Refuses a timm model where only an SReT can be written."""
    if hasattr(model.spec, "backbone"):
        raise SretError(
            f"{model.spec.backbone} cannot be written in the reference's layout: it is a timm "
            "model, not an SReT; its weights are in model.safetensors of its directory"
        )
