"""`sret eval`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import check_device
from sret_cli.commands.completion import PRECISIONS, datasets
from sret_cli.commands.flags import (
    DATA,
    MODEL,
    WHERE,
    Device,
    Json,
    LaterSlices,
    Runs,
    Slices,
    Workers,
)
from sret_cli.commands.output import (
    Output,
    check_csv_path,
    print_rows,
    run_or_newest,
    stderr_console,
)
from sret_cli.runtime.errors import USAGE, SretError


def evaluate(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Directory of a run; the newest run if not given."),
    ] = None,
    *,
    recursions: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,4",
            help="Evaluate with these recursion counts, on the same weights.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    slices: Slices = None,
    recursive_slices: LaterSlices = None,
    img_size: Annotated[
        int | None,
        typer.Option(help="Image size; position embeddings are resampled.", rich_help_panel=MODEL),
    ] = None,
    reference_shuffle: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="Draw shuffles as the reference did; results depend on batches and order.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder with val/ or test/, and the classes of the model.", rich_help_panel=DATA
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Kind of dataset, if not a folder of images: tar, hfds, wds …",
            autocompletion=datasets,
            rich_help_panel=DATA,
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the classes, where hfds or wds have several.", rich_help_panel=DATA
        ),
    ] = None,
    per_class: Annotated[
        bool,
        typer.Option("--per-class", help="Print the top-1 of each class.", rich_help_panel=WHERE),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Write the top-1 of each class to a file.", rich_help_panel=WHERE
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(metavar="<int>", min=1, help="Images at a time.", rich_help_panel=WHERE),
    ] = 256,
    precision: Annotated[
        str,
        typer.Option(help="fp32 or bf16.", autocompletion=PRECISIONS, rich_help_panel=WHERE),
    ] = "fp32",
    runs: Runs = Path("runs"),
    device: Device = "auto",
    workers: Workers = None,
    json_: Json = False,
) -> None:
    """Evaluate a run or a converted model on test images; repeated results are bitwise equal."""
    from sret_cli.report.tables import CLASS_COLUMNS, EVAL_TABLE, class_csv, class_table
    from sret_cli.runtime.files import write_atomically

    check_device(device)
    if out is not None:
        check_csv_path(out, ",".join(CLASS_COLUMNS))
    directory = run_or_newest(directory, runs)
    rows = evaluate_at(directory, recursion_counts(recursions), context.params)
    stderr_console().print(f"evaluated {directory} on {rows[0]['device_name']}")
    print_rows(rows, EVAL_TABLE, json_)
    for row in rows if per_class and not json_ else ():
        Output().print(class_table(row))
    if out is not None:
        write_atomically(out, class_csv(rows))
        stderr_console().print(f"wrote {out}")
    if len(rows) > 1:
        write_recursion_figure(rows, directory)


def evaluate_at(
    directory: Path, counts: list[int | None], flags: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of a run's evaluations, one for each recursion count.

    Args:
        directory: the run's.
        counts: recursion counts; None is the run's own.
        flags: the values of the flags of `sret eval`.
    """
    from sret_cli.runtime.progress import Display
    from sret_cli.spec.options import RunOptions
    from sret_cli.training.evaluate import EvaluationOptions, evaluate_run

    changeable = ("img_size", "slices", "recursive_slices")
    how = EvaluationOptions(
        data_dir=flags["data_dir"],
        dataset=flags["dataset"],
        label_column=flags["label_column"],
        batch_size=flags["batch_size"],
        precision=flags["precision"],
        changes={key: flags[key] for key in changeable if flags[key] is not None},
        reference_shuffle=flags["reference_shuffle"],
    )
    with Display(stderr_console(), f"evaluate {directory}", 1).showing() as progress:
        return [
            evaluate_run(
                directory,
                replace(how, recursions=count),
                options=RunOptions(device=flags["device"], workers=flags["workers"]),
                progress=progress,
            )
            for count in counts
        ]


def write_recursion_figure(rows: list[dict[str, Any]], directory: Path) -> None:
    """Draws accuracy and loss over the layers, and writes the figure next to the run."""
    from sret_cli.report.figures import plot_rows, save_figure
    from sret_cli.runtime.files import make_directory

    figure = plot_rows(rows, "layers", ["top1_percent", "test_loss"])
    files = save_figure(figure, make_directory(directory / "report") / "recursions")
    stderr_console().print(f"wrote {', '.join(map(str, files))}")


def recursion_counts(text: str | None) -> list[int | None]:
    """The different numbers of a text such as "1,2,4"; [None], the model's own, without a text.

    Raises:
        SretError: the text is not a list of whole numbers from 1.
    """
    if text is None:
        return [None]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise SretError(f"--recursions {text}: write whole numbers from 1, as in 1,2,4,8", USAGE)
    return list(dict.fromkeys(counts))
