"""The table of a built model's stages."""

from typing import Any

from rich.table import Table

from sret_cli.report.columns import COLUMNS
from sret_cli.report.tables import _least_width

SRET_COLUMNS = (
    "Stage",
    "Tokens",
    "Width",
    "Blocks x recursions",
    "Layers",
    "Slices, first pass",
    "Slices, later",
    "Params (M)",
)
BACKBONE_COLUMNS = ("Stage", "Sets of weights", "Layers", "Params (M)")


def stage_table(summary: dict[str, Any]) -> Table:
    """The stages of a built model, and its totals.

    Args:
        summary: what `model.summary.summarise` returned.
    """
    finite = "" if summary["logits_are_finite"] else "; its logits are NOT finite"
    seconds = summary["forward_seconds"]
    table = Table(
        caption=f"one {summary['model']['img_size']}-px image ran in {seconds:.2f} s{finite}",
        caption_justify="left",
        show_footer=True,
    )
    is_backbone = "backbone" in summary["model"]
    columns = BACKBONE_COLUMNS if is_backbone else SRET_COLUMNS
    lines = _backbone_lines(summary) if is_backbone else _sret_lines(summary)
    total = {
        "Stage": "total",
        "Layers": "–" if summary["layers"] is None else f"{summary['layers']:,}",
        "Params (M)": COLUMNS["params"].text(summary["params"]),
    }
    for index, column in enumerate(columns):
        footer = total.get(column, "")
        least = _least_width([*(line[index] for line in lines), footer])
        table.add_column(column, footer=footer, justify="right", min_width=least)
    for line in lines:
        table.add_row(*line)
    return table


def _backbone_lines(summary: dict[str, Any]) -> list[list[str]]:
    params = COLUMNS["params"]
    lines = [
        [stage["name"], str(stage["blocks"]), f"{stage['layers']:,}", params.text(stage["params"])]
        for stage in summary["stages"]
    ]
    return [*lines, ["all else", "", "", params.text(summary["params_outside_stages"])]]


def _sret_lines(summary: dict[str, Any]) -> list[list[str]]:
    params = COLUMNS["params"]
    lines = []
    for number, stage in enumerate(summary["stages"], 1):
        blocks, recursions = stage["blocks"], stage["recursions"]
        line = [number, stage["tokens"], stage["embed_dims"], f"{blocks} x {recursions}"]
        line += [f"{blocks * recursions:,}", stage["slices"], stage["recursive_slices"]]
        lines.append([*map(str, line), params.text(stage["params"])])
    outside = params.text(summary["params_outside_stages"])
    return [*lines, ["stem, pools, head", "", "", "", "", "", "", outside]]
