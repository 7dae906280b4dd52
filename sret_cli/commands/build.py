"""`sret build`."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sret_cli.commands.arguments import flags_given, study_from
from sret_cli.commands.flags import MODEL, MODEL_FLAGS, DataDir, Json, StudyFile, with_flags
from sret_cli.commands.output import Output, print_json, stderr_console
from sret_cli.report.columns import COLUMNS
from sret_cli.report.tables import _least_width
from sret_cli.runtime.errors import USAGE, SretError


@with_flags(MODEL)
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

    from sret_cli.model.kinds import build_any
    from sret_cli.weights.store import check_no_model, load_model, save_model

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
        stderr_console().print(f"wrote {out}/config.json and {out}/model.safetensors")
    if json_:
        return print_json(summaries if len(summaries) > 1 else summaries[0])
    for summary in summaries:
        Output().print(build_table(summary))


def build_summary(model: Any) -> dict[str, Any]:
    """What `sret build` says of a model, after one image ran through it, as plain values."""
    import torch

    from sret_cli.model.kinds import count_layers, describe_stages

    spec = model.spec
    x = torch.randn(1, spec.in_chans, spec.img_size, spec.img_size)
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model.eval()(x)
    seconds = time.perf_counter() - start
    total = sum(p.numel() for p in model.parameters())
    stages = describe_stages(model)
    return {
        "model": spec.model_dump(mode="json"),
        "stages": stages,
        "layers": count_layers(model),
        "params": total,
        "params_outside_stages": total - sum(stage["params"] for stage in stages),
        "forward_seconds": seconds,
        "logits_are_finite": bool(logits.isfinite().all()),
    }


def build_table(summary: dict[str, Any]) -> Table:
    """The stages of a built model, and its totals."""
    finite = "" if summary["logits_are_finite"] else "; its logits are NOT finite"
    seconds = summary["forward_seconds"]
    table = Table(
        caption=f"one {summary['model']['img_size']}-px image ran in {seconds:.2f} s{finite}",
        caption_justify="left",
        show_footer=True,
    )
    backbone = "backbone" in summary["model"]
    columns = ["Stage", "Tokens", "Width", "Blocks x recursions", "Layers"]
    columns += ["Slices, first pass", "Slices, later", "Params (M)"]
    if backbone:
        columns = ["Stage", "Sets of weights", "Layers", "Params (M)"]
    layers = "–" if summary["layers"] is None else f"{summary['layers']:,}"
    total = {"Stage": "total", "Layers": layers}
    total["Params (M)"] = COLUMNS["params"].text(summary["params"])
    outside = COLUMNS["params"].text(summary["params_outside_stages"])
    lines: list[list[str]] = []
    if backbone:
        for stage in summary["stages"]:
            line = [stage["name"], str(stage["blocks"]), f"{stage['layers']:,}"]
            lines.append([*line, COLUMNS["params"].text(stage["params"])])
        lines.append(["all else", "", "", outside])
    for number, stage in enumerate(() if backbone else summary["stages"], 1):
        blocks, recursions = stage["blocks"], stage["recursions"]
        line = [number, stage["tokens"], stage["embed_dims"], f"{blocks} x {recursions}"]
        line += [f"{blocks * recursions:,}", stage["slices"], stage["recursive_slices"]]
        lines.append([*map(str, line), COLUMNS["params"].text(stage["params"])])
    if not backbone:
        lines.append(["stem, pools, head", *[""] * 6, outside])
    for index, column in enumerate(columns):
        footer = total.get(column, "")
        least = _least_width([*(line[index] for line in lines), footer])
        table.add_column(column, footer=footer, justify="right", min_width=least)
    for line in lines:
        table.add_row(*line)
    return table
