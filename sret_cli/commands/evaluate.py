"""`sret eval`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sret_cli.commands.arguments import check_device
from sret_cli.commands.completion import PRECISIONS, datasets
from sret_cli.commands.convert import refuse_other_file
from sret_cli.commands.flags import Device, Json, LaterSlices, Runs, Slices, Workers
from sret_cli.commands.output import Output, print_rows, run_or_newest, stderr_console
from sret_cli.runtime.errors import USAGE, SretError


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
    from sret_cli.report.tables import CLASS_COLUMNS, EVAL_TABLE, class_csv, class_table
    from sret_cli.runtime.files import make_directory, write_atomically
    from sret_cli.runtime.progress import Display
    from sret_cli.spec.options import RunOptions
    from sret_cli.training.evaluate import EvaluationOptions, evaluate_run

    check_device(device)
    if out is not None:
        refuse_other_file(out, ",".join(CLASS_COLUMNS))
    directory = run_or_newest(directory, runs)
    given = {"img_size": img_size, "slices": slices, "recursive_slices": recursive_slices}
    changes = {key: value for key, value in given.items() if value is not None}
    counts = recursion_counts(recursions)
    how = EvaluationOptions(
        data_dir=data_dir,
        dataset=dataset,
        label_column=label_column,
        batch_size=batch_size,
        precision=precision,
        changes=changes,
        reference_shuffle=reference_shuffle,
    )
    with Display(stderr_console(), f"evaluate {directory}", 1).showing() as progress:
        rows = [
            evaluate_run(
                directory,
                replace(how, recursions=count),
                options=RunOptions(device=device, workers=workers),
                progress=progress,
            )
            for count in counts
        ]
    stderr_console().print(f"evaluated {directory} on {rows[0]['device_name']}")
    print_rows(rows, EVAL_TABLE, json_)
    for row in rows if per_class and not json_ else ():
        Output().print(class_table(row))
    if out is not None:
        write_atomically(out, class_csv(rows))
        stderr_console().print(f"wrote {out}")
    if len(rows) > 1:
        from sret_cli.report.figures import plot_rows, save_figure

        figure = plot_rows(rows, "layers", ["top1_percent", "test_loss"])
        stem = make_directory(directory / "report") / "recursions"
        files = save_figure(figure, stem)
        stderr_console().print(f"wrote {', '.join(map(str, files))}")


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
