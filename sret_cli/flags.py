"""What commands share: their flags, where output goes, and the study that flags describe."""

import json
import os
import sys
from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from sret_cli.completion import (
    DEVICES,
    PRECISIONS,
    choices,
    datasets,
    presets,
    recipes,
    studies,
)
from sret_cli.errors import DATA, USAGE, SretError
from sret_cli.processes import leads
from sret_cli.signs import fit_to_encoding

StudyFile = Annotated[
    Path | None,
    typer.Argument(metavar="[STUDY]", help="A study file (TOML).", autocompletion=studies),
]
Preset = Annotated[
    str | None,
    typer.Option(help="sret_t, sret_lt, sret_s, deep, nano …", autocompletion=presets),
]
Layers = Annotated[int | None, typer.Option(help="Layers (passes) in all: sets the recursions.")]
Backbone = Annotated[str | None, typer.Option(help="A model of timm's, in the preset's place.")]
Recursions = Annotated[int | None, typer.Option(help="Passes through each block.")]
Share = Annotated[
    str | None, typer.Option(help="A backbone's blocks with one set of weights: N or all.")
]
Slices = Annotated[int | None, typer.Option(help="Slices of all passes; each stage takes the gcd.")]
LaterSlices = Annotated[int | None, typer.Option(help="Slices of the later passes alone.")]
Nll = Annotated[
    str | None,
    typer.Option(
        help="per_pass, per_block or none.",
        autocompletion=choices("per_pass", "per_block", "none"),
    ),
]
ImgSize = Annotated[int | None, typer.Option(help="Height and width of the images.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes; those of the data if not given.")]
Params = Annotated[str | None, typer.Option(help="Parameters, by the width: 14M (within 1 %).")]
Macs = Annotated[str | None, typer.Option(help="FLOPs, by the width: 4.2G (within 1 %).")]
Twin = Annotated[
    str | None,
    typer.Option(
        help="The untied control: layers, params or macs.",
        autocompletion=choices("layers", "params", "macs"),
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other field: model.mlp_ratio=4.")]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="digits, folder, tar, hfds, hfds/NAME, wds or torch/NAME.", autocompletion=datasets
    ),
]
DataDir = Annotated[str | None, typer.Option(help="A folder with train/ and test/ or val/.")]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="Random images, for measuring speed.")]
OnBadImage = Annotated[
    str | None,
    typer.Option(
        help="An image that cannot be read: stop, or skip and count it.",
        autocompletion=choices("stop", "skip"),
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training.")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.")]
Seed = Annotated[int | None, typer.Option(help="Of the weights, the order and the augmentation.")]
LearningRate = Annotated[float | None, typer.Option(help="The highest learning rate.")]
WeightDecay = Annotated[float | None, typer.Option(help="Of the optimiser.")]
Recipe = Annotated[
    str | None,
    typer.Option(help="A published recipe: sret, deit, finetune, small.", autocompletion=recipes),
]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16.", autocompletion=PRECISIONS)]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile",
        help="Compile passes: on, off or auto (where it can be).",
        autocompletion=choices("on", "off", "auto"),
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", autocompletion=DEVICES)]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that load images.")]
Recompute = Annotated[str | None, typer.Option(help="none, pass, auto, or passes a segment.")]
GpuMemory = Annotated[str | None, typer.Option(help="A budget: 80G is 80e9 bytes.")]
EverySteps = Annotated[int | None, typer.Option(min=1, help="Save after every so many steps, too.")]
Minutes = Annotated[float, typer.Option(min=0, help="Save after so many minutes, too; 0: never.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write for TensorBoard, too.")]
Shard = Annotated[bool, typer.Option("--shard", help="Share weights out among processes (FSDP).")]
Runs = Annotated[Path, typer.Option(help="Where run directories are.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
MODEL = {
    **{"preset": Preset, "backbone": Backbone, "layers": Layers, "recursions": Recursions},
    **{"share": Share, "slices": Slices, "recursive_slices": LaterSlices, "nll": Nll},
    **{"img_size": ImgSize, "num_classes": NumClasses, "params": Params, "macs": Macs},
    **{"twin": Twin, "set_": Set},
}
MODEL_FLAGS = tuple(name for name in MODEL if name != "set_")
TRAINING = {
    **{"device": Device, "workers": Workers, "gpu_memory": GpuMemory},
    **{"checkpoint_every_steps": EverySteps, "checkpoint_minutes": Minutes},
    **{"tensorboard": Tensorboard, "shard": Shard},
}
TRAIN_FLAGS = (
    *("dataset", "data_dir", "on_bad_image", "recipe", "epochs", "batch_size", "lr"),
    *("weight_decay", "seed", "precision"),
)
DEFAULTS: dict[str, Any] = {
    **{"device": "auto", "checkpoint_minutes": 10.0, "tensorboard": False, "shard": False},
}


def takes(flags: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command more flags, behind its arguments; it finds them in its context."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command).parameters.values() if p.kind != Parameter.VAR_KEYWORD]
        last = sum(p.kind == Parameter.POSITIONAL_OR_KEYWORD for p in own)
        own[last:last] = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=DEFAULTS.get(name), annotation=kind)
            for name, kind in flags.items()
        ]
        command.__signature__ = Signature(own)  # type: ignore[attr-defined]
        return command

    return decorate


def notes() -> Console:
    """Where progress and notes go: stderr, of the first of several processes."""
    return Console(
        stderr=True,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        quiet=not leads(),
    )


LEAST_WIDTH = 20  # of tables: rich leaves the numbers out where there is no room for the frame


class PipeClosed(Exception):
    """The reader of our output, such as head, has had enough."""


class Output(Console):
    """Where tables go, results to stdout: wide where it is no terminal."""

    def __init__(self, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        columns = os.environ.get("COLUMNS", "")
        known = terminal and not columns or columns.isdecimal() and int(columns) > 0
        super().__init__(
            width=None if known else 200, highlight=False, markup=False, emoji=False, stderr=stderr
        )
        self.width = max(self.width, LEAST_WIDTH)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text in signs that the terminal has, so that columns are as wide as they look."""
        return super().render_str(fit_to_encoding(text, self.encoding), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints what a terminal that is too narrow breaks into lines; nothing is cut off."""
        super().print(*objects, **{"crop": False, **options})

    def on_broken_pipe(self) -> None:
        """Lets `main` end quietly, where rich would exit with 1."""
        raise PipeClosed


def print_json(value: Any) -> None:
    """The one JSON document on stdout."""
    try:
        print(json.dumps(value, indent=2), flush=True)
    except BrokenPipeError:
        raise PipeClosed from None


def run_or_newest(directory: Path | None, runs: Path) -> Path:
    """The directory that a user named, or that of the newest run, which is then said on stderr.

    While a study trains, the newest run is soon another one.
    """
    from sret_cli.records import newest_run, read_row

    if directory is not None:
        return directory
    directory = newest_run(runs)
    row = read_row(directory) or {}
    notes().print(f"took the newest run, {directory} ({row['name']}, of {row['started_at']})")
    return directory


def flags_given(context: typer.Context) -> dict[str, Any]:
    """The arguments and flags of a command that are not left at nothing."""
    return {k: v for k, v in context.params.items() if v is not None and v not in ([], ())}


def study_from(context: typer.Context, trains: bool) -> Any:
    """The study that a command's argument and flags describe; says where slices were fitted."""
    from sret_cli.study import from_flags

    given = flags_given(context)
    model = {key: given[key] for key in MODEL_FLAGS if key in given}
    if model.get("share", "").isdecimal():
        model["share"] = int(model["share"])
    train = {key: given[key] for key in (TRAIN_FLAGS if trains else ("data_dir",)) if key in given}
    if given.get("synthetic"):
        if "dataset" in train or "data_dir" in train:
            raise SretError(
                "--synthetic needs no other data; leave the one or the other out", USAGE
            )
        train["dataset"] = "synthetic"
    if trains and "compile_" in given:
        train["compile"] = given["compile_"]
    if trains and "recompute" in given:
        train["recompute"] = recompute_of(given["recompute"])
    settings, path = list(given.get("set_", ())), given.get("study")
    if "data_dir" in train and not trains and path is None:
        raise SretError("--data-dir goes with a study here, whose classes it counts", USAGE)
    study = from_flags(path, model, train if trains or path else None, settings)
    if path is None:
        spec = study.runs[0].model
        for field in ("recursive_slices", "slices"):
            if field in given:
                note_fitted_slices(spec, field, given[field])
    return study


def note_fitted_slices(spec: Any, field: str, wanted: int) -> None:
    """Says which stages take other slices than were asked for."""
    for stage, (slices, tokens) in enumerate(zip(getattr(spec, field), spec.tokens, strict=True)):
        if slices != wanted:
            many = "1 slice" if slices == 1 else f"{slices} slices"
            notes().print(f"stage {stage + 1}: its {tokens} tokens take {many}, not {wanted}")


def recompute_of(text: str | None) -> Any:
    """The value of --recompute, checked; None where it is not given."""
    from sret_cli.recipe import TrainSpec

    if text is None:
        return None
    value: Any = int(text) if text.isdecimal() else text
    return TrainSpec(recompute=value).recompute


def gpu_memory_of(text: str | None) -> int | None:
    """The bytes of --gpu-memory."""
    from sret_cli.cost import parse_quantity

    return None if text is None else parse_quantity(text)


def training_options(context: typer.Context) -> Any:
    """How and where to train, by a command's flags; a device that is not there is refused."""
    from sret_cli.launch import Options

    check_device(context.params["device"])
    given = {name: context.params[name] for name in TRAINING}
    return Options(**{**given, "gpu_memory": gpu_memory_of(given["gpu_memory"])})


def check_device(name: str | None) -> None:
    """Refuses a device that is not there before anything is done."""
    if name not in (None, "auto", "cpu"):
        from sret_cli.measure import choose_device

        choose_device(str(name))


def show_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    """Prints rows as a table, or whole as JSON."""
    from sret_cli import report

    if as_json:
        return print_json(rows)
    Output().print(report.terminal_table(*report.cells(rows, columns)))


def show_memory(
    runs: Any, options: Any, recompute: Any, precision: str | None, as_json: bool
) -> None:
    """Predicts the memory of runs, and prints it with what it comes to."""
    from sret_cli import report
    from sret_cli.launch import INFERENCE_NOTE, memory_verdict, predict_memory

    rows = [{**run.row(), **predict_memory(run, options, recompute, precision)} for run in runs]
    show_rows(rows, report.MEMORY_TABLE, as_json)
    for row in () if as_json else rows:
        Output().print(memory_verdict(row))
    if not as_json and any("inference_memory_bytes" in row for row in rows):
        Output().print(INFERENCE_NOTE)


def write_report(where: Path, spec: Any, out: Path, as_json: bool) -> None:
    """Prints and writes the report of the rows in a directory."""
    from sret_cli import report
    from sret_cli.figures import write_training_figure
    from sret_cli.records import read_rows

    rows = read_rows(where)
    if not rows:
        raise SretError(
            f"no finished runs in {where}; `sret train` or `sret run STUDY` makes some", DATA
        )
    files = report.write_report(rows, spec, out)
    files += write_training_figure(where, out)
    show_rows(rows, report.RUN_TABLE, as_json)
    notes().print(f"wrote {', '.join(file.name for file in files)} to {out}")


def finish(failed: list[Any]) -> None:
    """Ends with the exit code that failed runs call for.

    Raises:
        SretError: some runs failed; one run alone fails with its own reason and code.
    """
    if not failed:
        return
    (run, error), count = failed[0], len(failed)
    if count == 1:
        raise SretError(f"run {run.run_id} failed: {error}", error.code)
    code = max(error.code for _, error in failed)
    raise SretError(f"{count} runs failed, the first, {run.run_id}: {error}", code)
