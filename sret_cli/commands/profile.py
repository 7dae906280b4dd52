"""`sret profile`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import (
    check_device,
    engine_options,
    gpu_memory_of,
    model_flags_given,
    only_runs,
    recompute_of,
    study_from,
)
from sret_cli.commands.completion import DEVICES, PRECISIONS
from sret_cli.commands.flags import (
    WHERE,
    Backbone,
    Compile,
    DataDir,
    GpuMemory,
    ImgSize,
    Jobs,
    Json,
    LaterSlices,
    Layers,
    Macs,
    MaxRuns,
    Nll,
    NumClasses,
    Only,
    Params,
    Preset,
    Recompute,
    Recursions,
    Runs,
    Set,
    Share,
    Slices,
    StudyFile,
    Twin,
)
from sret_cli.commands.output import Output, exit_if_failed, print_rows, stderr_console
from sret_cli.runtime.errors import RESOURCES, USAGE, SretError


def profile(
    context: typer.Context,
    study: StudyFile = None,
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
    data_dir: DataDir = None,
    compile_: Compile = None,
    recompute: Recompute = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Predict the memory of training and evaluation; runs nothing.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    gpu_memory: GpuMemory = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Measure time and memory there: cpu, cuda or cuda:N.",
            autocompletion=DEVICES,
            rich_help_panel=WHERE,
        ),
    ] = None,
    measure_batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="<int>",
            min=1,
            help="Images of one step: 8, or with --memory the study's.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    measure_precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="fp32 or bf16: fp32, or with --memory the study's.",
            autocompletion=PRECISIONS,
            rich_help_panel=WHERE,
        ),
    ] = None,
    trace: Annotated[
        str,
        typer.Option(
            help="Trace each kind of pass once (passes), or every pass (full).",
            rich_help_panel=WHERE,
        ),
    ] = "passes",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="<name,name>",
            help="Also measure these timm models.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    jobs: Jobs = "1",
    only: Only = None,
    max_runs: MaxRuns = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Count parameters, FLOPs and activations; with --device, measure time and memory.

    The rows of a study are written to its run directories; predictions of --memory are only
    printed. Without arguments: all base presets. With --against, time and memory are measured, on
    the GPU if there is one, unless --device names another device.
    """
    options = measurement_options(context.params)
    if memory:
        return show_memory(context, options)
    if recompute is not None or gpu_memory is not None:
        raise SretError("--recompute and --gpu-memory need --memory here", USAGE)
    check_device(device)
    if study is None:
        return profile_models(context, options)
    if against is not None:
        raise SretError(f"{study} says what to measure; give it baselines = [...]", USAGE)
    profile_study(context, options)


def measurement_options(flags: dict[str, Any]) -> Any:
    """What to measure and how: the `RunOptions` of the flags of `sret profile`.

    Raises:
        SretError: a flag has an unknown value.
    """
    from sret_cli.spec.options import RunOptions
    from sret_cli.spec.train import check_compile_mode
    from sret_cli.study.execute import MEASURED_IMAGES

    trace, precision, batch_size = (
        flags[name] for name in ("trace", "measure_precision", "measure_batch_size")
    )
    if trace not in ("passes", "full"):
        raise SretError(f"unknown trace {trace!r}; use passes or full", USAGE)
    if precision not in (None, "fp32", "bf16"):
        raise SretError(f"unknown precision {precision!r}; use fp32 or bf16", USAGE)
    is_timed = flags["device"] or flags["against"]
    return RunOptions(
        device=flags["device"] or "auto",
        measure_batch_size=(batch_size or MEASURED_IMAGES) if is_timed else None,
        precision=precision or "fp32",
        compiles=check_compile_mode(flags["compile_"] or "off"),
        full_trace=trace == "full",
    )


def profile_study(context: typer.Context, options: Any) -> None:
    """Measures the runs of a study file, writes their rows and prints them."""
    from sret_cli.report.tables import COST_TABLE, PARITY_TABLE
    from sret_cli.study.engines import do_study

    flags = context.params
    found = only_runs(study_from(context, trains=False), flags["only"])
    engine = engine_options(context)
    outcome = do_study(found, flags["runs"], options, engine, stderr_console(), trains=False)
    published = all("published_gmacs" in row for row in outcome.rows)
    print_rows(outcome.rows, PARITY_TABLE if published else COST_TABLE, flags["json_"])
    exit_if_failed(outcome.failed)


def profile_models(context: typer.Context, options: Any) -> None:
    """Measures the model that flags describe, or the presets, and prints their rows."""
    from sret_cli.report.tables import COST_TABLE, breakdown_tables
    from sret_cli.study.execute import profile_run
    from sret_cli.study.file import with_baselines

    flags = context.params
    found = study_from(context, trains=False) if model_flags_given(context) else preset_study()
    if flags["against"] is not None:
        found = with_baselines(found, [name.strip() for name in flags["against"].split(",")])
    profiled = [profile_run(run, options) for run in found.runs]
    print_rows([row for row, _ in profiled], COST_TABLE, flags["json_"])
    if len(profiled) == 1 and not flags["json_"]:
        for table in breakdown_tables(profiled[0][1]):
            Output().print(table)
    errors = zip(found.runs, (row["error"] for row, _ in profiled), strict=True)
    exit_if_failed([(run, SretError(error, RESOURCES)) for run, error in errors if error])


def preset_study() -> Any:
    """The study of the base presets."""
    from sret_cli.spec.presets import BASE_PRESETS, PRESETS
    from sret_cli.spec.run import Run
    from sret_cli.study.file import Study

    return Study("profile", tuple(Run("profile", name, PRESETS[name]) for name in BASE_PRESETS))


def show_memory(context: typer.Context, options: Any) -> None:
    """Prints the predicted memory of the runs that arguments and flags describe."""
    from sret_cli.report.tables import INFERENCE_NOTE, MEMORY_TABLE, memory_verdict
    from sret_cli.study.execute import predicted_memory_columns
    from sret_cli.study.rows import planned_row

    flags = context.params
    options = replace(
        options,
        measure_batch_size=flags["measure_batch_size"],
        gpu_memory=gpu_memory_of(flags["gpu_memory"]),
    )
    runs = study_from(context, trains=False).runs
    recompute, precision = recompute_of(flags["recompute"]), flags["measure_precision"]
    rows = [
        {**planned_row(run), **predicted_memory_columns(run, options, recompute, precision)}
        for run in runs
    ]
    print_rows(rows, MEMORY_TABLE, flags["json_"])
    if flags["json_"]:
        return
    for row in rows:
        Output().print(memory_verdict(row))
    if any("inference_memory_bytes" in row for row in rows):
        Output().print(INFERENCE_NOTE)
