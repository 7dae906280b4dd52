"""`sret profile`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.arguments import (
    check_device,
    flags_given,
    gpu_memory_of,
    recompute_of,
    study_from,
)
from sret_cli.commands.completion import DEVICES, PRECISIONS
from sret_cli.commands.flags import (
    MODEL,
    MODEL_FLAGS,
    Compile,
    DataDir,
    GpuMemory,
    Json,
    Recompute,
    Runs,
    StudyFile,
    with_flags,
)
from sret_cli.commands.output import Output, exit_if_failed, print_rows, stderr_console
from sret_cli.runtime.errors import RESOURCES, USAGE, SretError
from sret_cli.study.rows import planned_row


@with_flags(MODEL)
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
    from sret_cli.report.tables import COST_TABLE, PARITY_TABLE, breakdown_tables
    from sret_cli.spec.options import RunOptions
    from sret_cli.spec.run import Run
    from sret_cli.spec.train import check_compile_mode
    from sret_cli.study.engine import run_study
    from sret_cli.study.execute import MEASURED_IMAGES, profile_run
    from sret_cli.study.file import Study, with_baselines

    if trace not in ("passes", "full"):
        raise SretError(f"unknown trace {trace!r}; use passes or full", USAGE)
    if measure_precision not in (None, "fp32", "bf16"):
        raise SretError(f"unknown precision {measure_precision!r}; use fp32 or bf16", USAGE)
    options = RunOptions(
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
        outcome = run_study(found, runs, options, stderr_console(), trains=False)
        published = all("published_gmacs" in row for row in outcome.rows)
        columns = PARITY_TABLE if published else COST_TABLE
        print_rows(outcome.rows, columns, json_)
        return exit_if_failed(outcome.failed)
    if flags_given(context).keys() & {*MODEL_FLAGS, "set_"}:
        found = study_from(context, trains=False)
    else:
        from sret_cli.spec.presets import BASE_PRESETS, PRESETS

        presets = tuple(Run("profile", name, PRESETS[name]) for name in BASE_PRESETS)
        found = Study("profile", presets)
    if against is not None:
        found = with_baselines(found, [name.strip() for name in against.split(",")])
    profiled = [profile_run(run, options) for run in found.runs]
    print_rows([row for row, _ in profiled], COST_TABLE, json_)
    if len(profiled) == 1 and not json_:
        for table in breakdown_tables(profiled[0][1]):
            Output().print(table)
    errors = zip(found.runs, (row["error"] for row, _ in profiled), strict=True)
    exit_if_failed([(run, SretError(error, RESOURCES)) for run, error in errors if error])


def show_memory(
    runs: Any, options: Any, recompute: Any, precision: str | None, as_json: bool
) -> None:
    """Predicts the memory of runs, and prints it with what it comes to."""
    from sret_cli.report.tables import (
        INFERENCE_NOTE,
        MEMORY_TABLE,
        memory_verdict,
    )
    from sret_cli.study.execute import predicted_memory_columns

    rows = [
        {**planned_row(run), **predicted_memory_columns(run, options, recompute, precision)}
        for run in runs
    ]
    print_rows(rows, MEMORY_TABLE, as_json)
    for row in () if as_json else rows:
        Output().print(memory_verdict(row))
    if not as_json and any("inference_memory_bytes" in row for row in rows):
        Output().print(INFERENCE_NOTE)
