"""Rows as tables: for the terminal, in Markdown and as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from sret_cli.report.columns import COLUMNS, FLOPS_NOTE, group_seeds, heading, mean_and_deviation
from sret_cli.spec.run import Row
from sret_cli.study.axes import varying_fields

if TYPE_CHECKING:
    from sret_cli.cost.breakdown import Profile

COST_TABLE = (
    *("layers", "params", "published_params_m", "macs", "published_gmacs", "activations"),
    *("activation_bytes", "measured_batch_size", "forward_seconds", "step_seconds"),
    *("inference_images_per_second", "training_images_per_second", "peak_memory_bytes"),
)
MEMORY_TABLE = (
    *("layers", "memory_batch_size", "weight_bytes", "gradient_bytes", "optimizer_bytes"),
    *("kept_bytes", "transient_bytes", "training_memory_bytes", "inference_memory_bytes"),
    "largest_batch",
)
PARITY_TABLE = (
    *("params", "published_params_m", "params_m_minus_published"),
    *("macs", "published_gmacs", "gmacs_minus_published"),
    *("published_top1_percent", "published_distilled_top1_percent"),
)
RUN_TABLE = (
    *("layers", "params", "macs", "activation_bytes", "peak_memory_bytes", "step_seconds"),
    *("images_per_second", "train_seconds", "final_loss", "test_loss"),
    *("top1_percent", "top5_percent", "ema_top1_percent"),
)
EVAL_TABLE = (
    *("recursions", "layers", "params", "test_images", "test_loss", "top1_percent"),
    *("mean_class_top1_percent", "top5_percent"),
)
CLASS_COLUMNS = (
    *("run_id", "averaged", "recursions", "layers", "class", "test_images", "top1_percent"),
)


def table_cells(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table; runs that differ only in their seed are one line.

    Such a line has means, with the sample standard deviation behind ±. A value that was not
    measured is a dash.
    """
    fields = varying_fields(rows)
    fields = fields if "name" in fields else ["name", *fields]
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    seeds = any(len(g.rows) > 1 for g in group_seeds(rows, fields))
    failed = any(row.get("error") for row in rows)
    headings = [heading(f) for f in fields] + ["Runs"] * seeds
    headings += [COLUMNS[c].heading for c in columns] + ["Error"] * failed
    lines = []
    for member in group_seeds(rows, fields):
        line = list(member.fields.values()) + [str(len(member.rows))] * seeds
        for column in columns:
            values = member.values(column)
            if not values:
                line.append("–")
                continue
            mean, deviation = mean_and_deviation(values)
            line.append(COLUMNS[column].text(mean, deviation))
            spread = member.values(f"{column}_iqr")
            if len(spread) == 1:
                line[-1] += f" (IQR {COLUMNS[column].text(spread[0])})"
        if failed:
            line.append("; ".join(row["error"] for row in member.rows if row.get("error")) or "–")
        lines.append(line)
    return headings, lines


def terminal_table(headings: list[str], lines: list[list[str]], title: str = "") -> Table:
    """A table for the terminal: numbers align to the right, the FLOPs convention is under it."""
    note = FLOPS_NOTE if any("FLOPs" in heading for heading in headings) else None
    table = Table(title=title or None, caption=note, caption_justify="left", title_justify="left")
    for index, text in enumerate(headings):
        numeric = all(_is_number(line[index]) for line in lines)
        table.add_column(
            text,
            justify="right" if numeric else "left",
            overflow="fold",
            min_width=_least_width([line[index] for line in lines]),
        )
    for line in lines:
        table.add_row(*line)
    return table


def _least_width(texts: Sequence[str]) -> int:
    """The width below which a column does not shrink, so that numbers are not broken in two."""
    return min(max((len(word) for text in texts for word in text.split()), default=1), 12)


def _is_number(text: str) -> bool:
    return text == "–" or text[:1].isdigit() or text[:1] == "-"


def markdown_table(headings: list[str], lines: list[list[str]]) -> str:
    """The table in Markdown, with the FLOPs convention under it."""
    numeric = [all(_is_number(line[i]) for line in lines) for i in range(len(headings))]
    rows = [headings, ["---:" if right else "---" for right in numeric], *lines]
    text = "".join("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |\n" for r in rows)
    return text + (f"\n{FLOPS_NOTE}\n" if any("FLOPs" in h for h in headings) else "")


def csv_text(rows: Sequence[Row]) -> str:
    """All rows and columns as CSV: unrounded floats, lists as JSON, empty if not measured."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return text.getvalue()


def breakdown_tables(profile: "Profile") -> list[Table]:
    """Tables of a model's cost: by stage, if stages are known, and by kind of work."""
    spec, macs = profile.spec, COLUMNS["macs"]
    headings = ["Stage", "Tokens", "Width", "Layers", "Params (M)", macs.heading, "Share (%)"]
    lines = []
    stages = zip(profile.params_by_stage, profile.macs_by_stage(), strict=True)
    for s, (params, cost) in enumerate(stages):
        assert not spec.is_timm
        layers = f"{spec.blocks[s] * spec.recursions[s]:,}"
        line = [str(s + 1), str(spec.tokens[s]), str(spec.embed_dims[s]), layers]
        line += [COLUMNS["params"].text(params), macs.text(cost)]
        lines.append([*line, f"{100 * cost / profile.macs:.1f}"])
    kinds = [
        [kind, macs.text(cost), f"{100 * cost / profile.macs:.1f}"]
        for kind, cost in profile.macs_by_kind().items()
        if cost
    ]
    by_stage = [terminal_table(headings, lines, "By stage")] if lines else []
    return [
        *by_stage,
        terminal_table(["Kind", macs.heading, "Share (%)"], kinds, "By kind of work"),
    ]


def class_table(row: Row) -> Table:
    """Top-1 of each class of an evaluation; the title names the model, the caption has the mean."""
    columns = ("test_images", "top1_percent")
    lines = [
        [line["class"], *(COLUMNS[c].text(line[c]) for c in columns)] for line in row["per_class"]
    ]
    depth = [f"{key} {row[key]:,}" for key in ("recursions", "layers") if row[key] is not None]
    title = ", ".join((row["name"] or row["run_id"], *depth))
    table = terminal_table(["Class", *(COLUMNS[c].heading for c in columns)], lines, title)
    mean = COLUMNS["mean_class_top1_percent"]
    table.caption = f"{mean.heading}: {mean.text(row['mean_class_top1_percent'])}"
    return table


def class_csv(rows: Sequence[Row]) -> str:
    """Images and unrounded top-1 as CSV, a line for each evaluation and class."""
    return csv_text(
        [
            {column: {**row, **line}[column] for column in CLASS_COLUMNS}
            for row in rows
            for line in row["per_class"]
        ]
    )


INFERENCE_NOTE = (
    "Inference is of the model as `sret eval` runs it. Its fused copy, which `sret profile "
    "--device` measures, needs less."
)


def memory_verdict(row: Row) -> str:
    """The memory that a row predicts, and whether it fits the budget, in one line."""
    if "training_memory_bytes" not in row:
        return f"{row['name']}: memory is not predicted for timm models; measure it with --device"
    needed, budget = row["training_memory_bytes"], row["gpu_memory_bytes"]
    batch = f"a batch of {row['memory_batch_size']:,}"
    text = f"{row['name']}: {batch} needs {needed / 1e9:.2f} GB to train"
    stages = enumerate(zip(row["recomputed"], row["segments"], strict=True), 1)
    recomputed = [
        f"{passes:,} passes of stage {stage} in segments of {length:,}"
        for stage, (passes, length) in stages
        if length
    ]
    if recomputed:
        text += f", recomputing {', '.join(recomputed)}"
    if budget is None:
        return text
    largest = (
        f"largest batch: {row['largest_batch']:,}" if row["largest_batch"] else "no batch fits"
    )
    if row["fits"]:
        return f"{text}; it fits in {budget / 1e9:g} GB ({largest})"
    return f"{text}, {(needed - budget) / 1e9:.2f} GB more than {budget / 1e9:g} GB ({largest})"
