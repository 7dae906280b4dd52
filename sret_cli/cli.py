"""The commands of `sret`; the one place that turns errors into messages and exit codes."""

import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sret_cli import __version__
from sret_cli.clean_commands import clean
from sret_cli.command import Command
from sret_cli.completion import DEVICES, PRECISIONS, studies
from sret_cli.data_commands import data_app
from sret_cli.distill_commands import distill_labels
from sret_cli.errors import RESOURCES, USAGE, SretError, lost_loader, out_of_memory
from sret_cli.flags import (
    MODEL,
    MODEL_FLAGS,
    Compile,
    DataDir,
    GpuMemory,
    Json,
    Output,
    PipeClosed,
    Recompute,
    Runs,
    StudyFile,
    check_device,
    finish,
    flags_given,
    gpu_memory_of,
    notes,
    print_json,
    recompute_of,
    show_memory,
    show_rows,
    study_from,
    takes,
    write_report,
)
from sret_cli.interrupt import CODES
from sret_cli.processes import leads
from sret_cli.signs import prepare_streams
from sret_cli.train_commands import run, train
from sret_cli.weight_commands import convert, evaluate, export

LEADER_SECONDS = 5.0  # in which the first of several processes fails where this one does

app = typer.Typer(
    name="sret",
    help="Scaling studies of deep vision transformers with shared weights.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
@takes(MODEL)
def build(
    context: typer.Context,
    study: StudyFile = None,
    *,
    data_dir: DataDir = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Of the weights and image.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write config.json and weights there.")] = None,
    from_: Annotated[Path | None, typer.Option("--from", help="Read a model from there.")] = None,
    json_: Json = False,
    **_: Any,
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
@takes(MODEL)
def profile(
    context: typer.Context,
    study: StudyFile = None,
    *,
    data_dir: DataDir = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Measure time and memory there: cpu, cuda or cuda:N.", autocompletion=DEVICES
        ),
    ] = None,
    measure_batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Images a step: 8, with --memory the study's."),
    ] = None,
    measure_precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="fp32 or bf16: fp32, with --memory the study's.",
            autocompletion=PRECISIONS,
        ),
    ] = None,
    trace: Annotated[
        str, typer.Option(help="Each kind of pass (passes), or all, to check (full).")
    ] = "passes",
    compile_: Compile = None,
    against: Annotated[
        str | None, typer.Option(help="Models of timm's to measure beside, with commas between.")
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Predict the memory of training and of evaluation, on a GPU or a cpu."
        ),
    ] = False,
    recompute: Recompute = None,
    gpu_memory: GpuMemory = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    **_: Any,
) -> None:
    """Measure parameters, FLOPs and activations; with --device, time and memory too.

    A study's rows are kept in its run directories, but for predictions, which are only shown.
    Without arguments: the presets, side by side. With --against, time and memory are measured on
    the GPU, or where there is none on the CPU, unless --device says where.
    """
    from sret_cli import report
    from sret_cli.launch import MEASURED_IMAGES, Options, profile_run, run_study
    from sret_cli.recipe import check_compile_mode
    from sret_cli.run import Run
    from sret_cli.study import Study, with_baselines

    if trace not in ("passes", "full"):
        raise SretError(f"unknown trace {trace!r}; use passes or full", USAGE)
    if measure_precision not in (None, "fp32", "bf16"):
        raise SretError(f"unknown precision {measure_precision!r}; use fp32 or bf16", USAGE)
    options = Options(
        device=device or "auto",
        measure_batch_size=(measure_batch_size or MEASURED_IMAGES) if device or against else None,
        precision=measure_precision or "fp32",
        compiles=check_compile_mode(compile_ or "off"),
        full_trace=trace == "full",
    )
    if memory:
        predicted = replace(
            options, measure_batch_size=measure_batch_size, gpu_memory=gpu_memory_of(gpu_memory)
        )
        found = study_from(context, trains=False)
        return show_memory(found.runs, predicted, recompute_of(recompute), measure_precision, json_)
    if recompute is not None or gpu_memory is not None:
        raise SretError("--recompute and --gpu-memory go with --memory here", USAGE)
    check_device(device)
    if study is not None:
        if against is not None:
            raise SretError(f"{study} says what to measure; give it baselines = [...]", USAGE)
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
    if against is not None:
        found = with_baselines(found, [name.strip() for name in against.split(",")])
    profiled = [profile_run(run, options) for run in found.runs]
    show_rows([row for row, _ in profiled], report.COST_TABLE, json_)
    if len(profiled) == 1 and not json_:
        for table in report.breakdown_tables(profiled[0][1]):
            Output().print(table)
    errors = zip(found.runs, (row["error"] for row, _ in profiled), strict=True)
    finish([(run, SretError(error, RESOURCES)) for run, error in errors if error])


app.command()(train)
app.command(name="eval")(evaluate)
app.command()(convert)


@app.command(name="report")
def report_command(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STUDY | RUN | DIR]",
            help="A study file, or where rows are.",
            autocompletion=studies,
        ),
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


app.command()(run)
app.command()(clean)
app.command()(export)
app.command()(distill_labels)
app.add_typer(data_app)
for info in (*app.registered_commands, *data_app.registered_commands):
    info.cls = Command


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs `sret` and exits with the code of the outcome."""
    prepare_streams()
    arguments = spell_out(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    for number in CODES.keys() - {signal.SIGINT}:
        signal.signal(number, _terminated)
    try:
        rest = [argument for argument in arguments if argument != "--debug"]
        code = app(args=rest, prog_name="sret", standalone_mode=False)
        sys.stdout.flush()
    except SretError as error:
        if error.table:
            from sret_cli.report import terminal_table

            headings, *lines = map(list, error.table)
            Output(stderr=True).print(terminal_table(headings, lines))
        code = _fail(str(error), error.code, debug, error.tells)
    except typer.TyperException as error:
        code = _fail(error.format_message(), USAGE, debug)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted; what was finished is kept", 130, debug)
    except (RuntimeError, MemoryError) as error:
        found = out_of_memory(error) or lost_loader(error)
        if found is None:
            raise
        code = _fail(str(found), found.code, debug)
    except (PipeClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def spell_out(arguments: list[str]) -> list[str]:
    """The arguments with what a bare --compile stands for, which is on."""
    spelt = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        spelt.append(argument)
        if argument == "--compile" and (following[:1] in ("", "-") or following.endswith(".toml")):
            spelt.append("on")
    return spelt


def _terminated(signal_number: int, frame: object) -> NoReturn:
    raise SystemExit(CODES[signal.Signals(signal_number)])


def _fail(message: str, code: int, debug: bool, tells: bool | None = None) -> int:
    if debug:
        traceback.print_exc()
    if tells is None and not leads():
        # What fails all processes alike is told by the first: its end ends this one meanwhile.
        time.sleep(LEADER_SECONDS)
        tells = True
    if tells is not False:
        print(f"sret: {message}", file=sys.stderr)
    return code
