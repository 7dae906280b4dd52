"""The commands of `sret`; the one place that turns errors into messages and exit codes."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from sret_cli import __version__
from sret_cli.errors import DATA, USAGE, SretError, out_of_memory

app = typer.Typer(
    name="sret",
    help="Scaling studies of deep vision transformers with shared weights.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

StudyFile = Annotated[Path | None, typer.Argument(metavar="[STUDY]", help="A study file (TOML).")]
Preset = Annotated[str | None, typer.Option(help="sret_t, sret_lt, sret_s, deep, nano …")]
Layers = Annotated[int | None, typer.Option(help="Layers (passes) in all: sets the recursions.")]
Backbone = Annotated[str | None, typer.Option(help="A model of timm's, in the preset's place.")]
Recursions = Annotated[int | None, typer.Option(help="Passes through each block.")]
Share = Annotated[
    str | None, typer.Option(help="A backbone's blocks with one set of weights: N or all.")
]
Slices = Annotated[int | None, typer.Option(help="Slices of all passes; each stage takes the gcd.")]
LaterSlices = Annotated[int | None, typer.Option(help="Slices of the later passes alone.")]
Nll = Annotated[str | None, typer.Option(help="per_pass, per_block or none.")]
ImgSize = Annotated[int | None, typer.Option(help="Height and width of the images.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes; those of the data if not given.")]
Params = Annotated[str | None, typer.Option(help="Parameters, by the width: 14M (within 1 %).")]
Macs = Annotated[str | None, typer.Option(help="FLOPs, by the width: 4.2G (within 1 %).")]
Twin = Annotated[str | None, typer.Option(help="The untied control: layers, params or macs.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other field: model.mlp_ratio=4.")]
Dataset = Annotated[str | None, typer.Option(help="digits (embedded) or folder.")]
DataDir = Annotated[str | None, typer.Option(help="A folder with train/ and test/ or val/.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training.")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.")]
Seed = Annotated[int | None, typer.Option(help="Of the weights, the order and the augmentation.")]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that load images.")]
Runs = Annotated[Path, typer.Option(help="Where run directories are.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

MODEL_FLAGS = (
    *("preset", "layers", "slices", "recursive_slices", "nll", "img_size", "num_classes"),
    *("params", "macs", "twin", "backbone", "recursions", "share"),
)
TRAIN_FLAGS = ("dataset", "data_dir", "epochs", "batch_size", "seed", "precision")


def notes() -> Console:
    """Where progress and notes go: stderr."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class PipeClosed(Exception):
    """The reader of our output, such as head, has had enough."""


class Output(Console):
    """Where tables go, results to stdout: wide where it is no terminal."""

    def __init__(self, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        wide = None if terminal or "COLUMNS" in os.environ else 200
        super().__init__(width=wide, highlight=False, markup=False, stderr=stderr)

    def on_broken_pipe(self) -> None:
        """Lets `main` end quietly, where rich would exit with 1."""
        raise PipeClosed


def print_json(value: Any) -> None:
    """The one JSON document on stdout."""
    try:
        print(json.dumps(value, indent=2), flush=True)
    except BrokenPipeError:
        raise PipeClosed from None


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


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Scaling studies of deep vision transformers with shared weights."""
    if version:
        print(f"sret {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command()
def build(
    context: typer.Context,
    study: StudyFile = None,
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
    data_dir: DataDir = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of the weights and image.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write config.json and weights there.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="Read a model from there.")] = None,
    json_: Json = False,
) -> None:
    """Build a model, run one image through it, and print its stages."""
    import torch

    from sret_cli.recurse import build_any
    from sret_cli.report import build_summary, build_table
    from sret_cli.weights import check_no_model, load_model, save_model

    flags = [f for f in ("study", *MODEL_FLAGS, "set_") if f in flags_given(context)]
    if from_ is not None and flags:
        raise SretError(f"--from reads a whole model; leave out {', '.join(flags)}", USAGE)
    if out is not None:
        check_no_model(out)
    torch.manual_seed(seed)
    if from_ is not None:
        models = [load_model(from_)]
    else:
        specs = dict.fromkeys(run.model for run in study_from(context, trains=False).runs)
        if out is not None and len(specs) > 1:
            raise SretError(f"--out takes one model, and {study} has {len(specs)}", USAGE)
        models = [build_any(spec) for spec in specs]
    summaries = [build_summary(model) for model in models]
    if out is not None:
        save_model(models[0], out)
        notes().print(f"wrote {out}/config.json and {out}/model.safetensors")
    if json_:
        return print_json(summaries if len(summaries) > 1 else summaries[0])
    for summary in summaries:
        Output().print(build_table(summary))


@app.command()
def profile(
    context: typer.Context,
    study: StudyFile = None,
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
    data_dir: DataDir = None,
    device: Annotated[
        str | None, typer.Option(help="Measure time and memory there: cpu or cuda.")
    ] = None,
    measure_batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images a step, for measuring.")
    ] = 8,
    measure_precision: Annotated[
        str, typer.Option("--precision", help="fp32 or bf16, for measuring.")
    ] = "fp32",
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Measure parameters, FLOPs and activations; with --device, time and memory too.

    A study's rows are kept in its run directories. Without arguments: the presets, side by side.
    """
    from sret_cli import report
    from sret_cli.launch import Options, profile_run, run_study
    from sret_cli.study import Run, Study

    if measure_precision not in ("fp32", "bf16"):
        raise SretError(f"unknown precision {measure_precision!r}; use fp32 or bf16", USAGE)
    options = Options(
        device=device or "auto",
        measure_batch_size=None if device is None else measure_batch_size,
        precision=measure_precision,
    )
    check_device(device)
    if study is not None:
        found = study_from(context, trains=False)
        outcome = run_study(found, runs, options, notes(), trains=False)
        published = all("published_gmacs" in row for row in outcome.rows)
        columns = report.PARITY_TABLE if published else report.COST_TABLE
        show_rows(outcome.rows, columns, json_)
        return finish(outcome.failed)
    if flags_given(context).keys() & {*MODEL_FLAGS, "set_"}:
        found = study_from(context, trains=False)
    else:
        from sret_cli.spec import BASE_PRESETS, PRESETS

        presets = tuple(Run("profile", name, PRESETS[name]) for name in BASE_PRESETS)
        found = Study("profile", presets)
    profiled = [profile_run(run, options) for run in found.runs]
    show_rows([row for row, _ in profiled], report.COST_TABLE, json_)
    if len(profiled) == 1 and not json_:
        for table in report.breakdown_tables(profiled[0][1]):
            Output().print(table)


@app.command()
def train(
    context: typer.Context,
    study: StudyFile = None,
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
    dataset: Dataset = None,
    data_dir: DataDir = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    precision: Precision = None,
    device: Device = "auto",
    workers: Workers = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Train the runs of a study that are missing, or one model: by default `nano` on `digits`."""
    from sret_cli import report
    from sret_cli.launch import Options, run_study

    check_device(device)
    found = study_from(context, trains=True)
    if all(run.train is None for run in found.runs):
        raise SretError(f"{study} trains nothing: it has no [train]; use `sret profile`")
    outcome = run_study(found, runs, Options(device, workers), notes())
    show_rows(outcome.rows, report.RUN_TABLE, json_)
    for run in found.runs if len(found.runs) == 1 else ():
        notes().print(f"kept in {run.directory(runs)}")
    finish(outcome.failed)


@app.command(name="eval")
def evaluate(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run's directory; the newest if not given."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="A folder with val/ or test/, and as many classes as the model."),
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
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 256,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Device = "auto",
    workers: Workers = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Evaluate a run, or a converted model, on test images; twice the same is bitwise the same."""
    from sret_cli import report
    from sret_cli.launch import Display
    from sret_cli.records import make_directory, newest_run
    from sret_cli.train import evaluate_run

    check_device(device)
    directory = directory or newest_run(runs)
    given = {"img_size": img_size, "slices": slices, "recursive_slices": recursive_slices}
    changes = {key: value for key, value in given.items() if value is not None}
    counts = recursion_counts(recursions)
    with Display(notes(), f"evaluate {directory}", 1).showing() as on_step:
        rows = [
            evaluate_run(
                *(directory, data_dir, batch_size, precision, device, workers, changes),
                *(reference_shuffle, on_step, count),
            )
            for count in counts
        ]
    notes().print(f"evaluated {directory} on {rows[0]['device_name']}")
    show_rows(rows, report.EVAL_TABLE, json_)
    for row in rows if per_class and not json_ else ():
        Output().print(report.class_table(row["per_class"]))
    if len(rows) > 1:
        from sret_cli.figures import plot, save_figure

        figure = plot(rows, "layers", ["top1_percent", "test_loss"])
        stem = make_directory(directory / "report") / "recursions"
        files = save_figure(figure, stem)
        notes().print(f"wrote {', '.join(map(str, files))}")


@app.command()
def convert(
    file: Annotated[
        Path, typer.Argument(help="A .pth, .pt or .safetensors file, in the reference's layout.")
    ],
    out: Annotated[Path, typer.Option(help="Write config.json and model.safetensors there.")],
    preset: Annotated[str | None, typer.Option(help="The design, if not to be recognised.")] = None,
    slices: Slices = None,
    recursive_slices: LaterSlices = None,
    img_size: Annotated[
        int | None, typer.Option(help="Resample the position embeddings for these images.")
    ] = None,
    reset_head: Annotated[
        bool, typer.Option("--reset-head", help="A fresh head, with --num-classes.")
    ] = False,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the fresh head.")] = None,
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
    given |= {"img_size": img_size, "num_classes": num_classes, **model_settings(set_ or [])}
    changes = {key: value for key, value in given.items() if value is not None}
    if to_reference:
        if changes or preset or reset_head:
            raise SretError("--to-reference writes a model as it is; leave out the rest", USAGE)
        model, name = load_model(file), file.name
        refuse_backbone(model, "the reference's layout of")
        notes().print(f"wrote {save_reference(model, out)}")
    else:
        torch.manual_seed(0)  # of a fresh head
        model, name, remarks = read_reference(file, preset, changes, reset_head)
        source = {"file": file.name, "sha256": sha256(file)}
        save_model(model, out, {"name": name, "source": source})
        for remark in (*remarks, f"wrote {out}/config.json and {out}/model.safetensors"):
            notes().print(remark)
    params = sum(p.numel() for p in model.parameters())
    row = {"name": name, "layers": model.spec.layers, "params": params}
    row |= {f"model.{key}": value for key, value in model.spec.model_dump(mode="json").items()}
    show_rows([row], ("layers", "params"), json_)


@app.command(name="report")
def report_command(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[STUDY | RUN | DIR]", help="A study file, or where rows are."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; beside the rows if not given.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Print a table of what runs measured, and write it as Markdown and CSV with figures."""
    from sret_cli.study import ReportSpec, load_report

    spec, where = ReportSpec(), path or runs
    if path is not None and path.suffix == ".toml" and not path.is_dir():
        spec, where = load_report(path), runs / path.stem
    write_report(where, spec, out or where / "report", json_)


@app.command()
def run(
    context: typer.Context,
    study: StudyFile = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    workers: Workers = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; beside the rows if not given.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Profile, train and report a study in one; what is there already is not done again."""
    from sret_cli.launch import Options, run_study
    from sret_cli.records import make_directory

    check_device(device)
    found = study_from(context, trains=True)
    if out is not None:
        make_directory(out)
    outcome = run_study(found, runs, Options(device, workers), notes())
    where = runs / found.name
    write_report(where, found.report, out or where / "report", json_)
    finish(outcome.failed)


@app.command()
def export(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A run, or what `sret build --out` wrote."),
    ] = None,
    to: Annotated[str, typer.Option(help="safetensors, torch-export or onnx.")] = "safetensors",
    preset: Preset = None,
    layers: Layers = None,
    slices: Slices = None,
    recursive_slices: LaterSlices = None,
    nll: Nll = None,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    params: Params = None,
    macs: Macs = None,
    twin: Twin = None,
    set_: Set = None,
    seed: Annotated[int, typer.Option(help="Of the weights, where flags say the model.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A new directory; exports/NAME-FORMAT if not given.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Write a model as safetensors, torch.export or ONNX, check its logits, add a model card.

    DIR is the newest run if not given; with flags it is an untrained model. The shared weights
    stand once in the file, whatever the depth.
    """
    import torch

    from sret_cli.export import check_export, export_model
    from sret_cli.records import newest_run, read_row
    from sret_cli.recurse import build_any
    from sret_cli.weights import load_model

    flags = [f for f in (*MODEL_FLAGS, "set_") if f in flags_given(context)]
    if directory is not None and flags:
        raise SretError(f"{directory} is a whole model; leave out {', '.join(flags)}", USAGE)
    if flags:
        run = study_from(context, trains=False).runs[0]
        torch.manual_seed(seed)
        name, model, row = run.name, build_any(run.model), None
    else:
        directory = directory or newest_run(runs)
        model, row = load_model(directory), read_row(directory)
        name = row["name"] if row else directory.name
    refuse_backbone(model, f"{to} of")
    out = out or Path("exports") / f"{name}-{to}"
    check_export(to, out)
    with notes().status(f"exporting {name} to {to}"):
        written = export_model(model, to, out, name, row)
    if json_:
        return print_json({**vars(written), "file": str(written.file)})
    print(written)
    notes().print(f"wrote {out}/README.md, the model card")


def refuse_backbone(model: Any, what: str) -> None:
    """Refuses a model of timm's where only ours can be written."""
    if hasattr(model.spec, "backbone"):
        raise SretError(
            f"{what} {model.spec.backbone} cannot be written: it is a timm model, not an SReT; "
            "its weights are in model.safetensors of its directory"
        )


def check_device(name: str | None) -> None:
    """Refuses a device that is not there before anything is done."""
    if name not in (None, "auto", "cpu"):
        from sret_cli.measure import choose_device

        choose_device(str(name))


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


def show_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    """Prints rows as a table, or whole as JSON."""
    from sret_cli import report

    if as_json:
        return print_json(rows)
    Output().print(report.terminal_table(*report.cells(rows, columns)))


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


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs `sret` and exits with the code of the outcome."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(args=[a for a in arguments if a != "--debug"], standalone_mode=False)
        sys.stdout.flush()
    except SretError as error:
        if error.table:
            from sret_cli.report import terminal_table

            headings, *lines = map(list, error.table)
            Output(stderr=True).print(terminal_table(headings, lines))
        code = _fail(str(error), error.code, debug)
    except typer.TyperException as error:
        code = _fail(error.format_message(), USAGE, debug)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted; what was finished is kept", 130, debug)
    except (RuntimeError, MemoryError) as error:
        found = out_of_memory(error)
        if found is None:
            raise
        code = _fail(str(found), found.code, debug)
    except (PipeClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def _terminated(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signal_number)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"sret: {message}", file=sys.stderr)
    return code
