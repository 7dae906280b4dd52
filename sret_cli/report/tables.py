"""Rows as tables: for the terminal, in Markdown and as CSV."""

import csv
import io
import json
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from sret_cli.cost.budget import TWIN_KINDS
from sret_cli.report.columns import ACCURACIES, COLUMNS, FLOPS_NOTE, VARYING, heading
from sret_cli.report.groups import SEED, Group, group_seeds, role_of
from sret_cli.report.intervals import CAPTIONS, spread, wilson
from sret_cli.spec.run import BASELINE, SHARED, Row, twin_role
from sret_cli.study.axes import format_value, varying_fields

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


def table_cells(
    rows: Sequence[Row], columns: Sequence[str], interval: str = "ci95"
) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table; runs that differ only in their seed are one line.

    Such a line has means with their intervals over seeds, and under "Seeds" the number of runs with
    results. An accuracy of a single seed has the interval of its test images in brackets. A value
    that was not measured is a dash; failed runs are named under "Failed" and count for nothing.

    Args:
        rows: what runs measured.
        columns: what to show of it, if any row has it.
        interval: one of `intervals.KINDS`.
    """
    groups = in_blocks(group_seeds(rows))
    fields = table_fields([group.first for group in groups])
    columns = [c for c in columns if any(row.get(c) is not None for row in rows)]
    seeds = any(len(group.rows) > 1 for group in groups)
    failed = any(row.get("error") for row in rows)
    headings = [heading(f) for f in fields] + ["Seeds"] * seeds
    headings += [COLUMNS[c].heading for c in columns] + ["Failed"] * failed
    lines = []
    for group in groups:
        line = [field_text(group.first, field) for field in fields]
        line += [str(sum(not row.get("error") for row in group.rows))] * seeds
        line += [_cell(group, column, interval) for column in columns]
        lines.append(line + [_failures(group)] * failed)
    return headings, lines


def in_blocks(groups: Sequence[Group]) -> list[Group]:
    """Groups of one role next to each other: shared models first, then twins, then baselines."""
    order = (SHARED, *map(twin_role, TWIN_KINDS), BASELINE)
    return sorted(groups, key=lambda group: order.index(role_of(group.first)))


def table_fields(rows: Sequence[Row]) -> list[str]:
    """The fields that tell the lines of a table apart: name, role, and settings that vary."""
    fields = varying_fields(rows)
    return fields if "name" in fields else ["name", *fields]


def field_text(row: Row, field: str) -> str:
    """The value of a field of a row, as tables and legends show it."""
    return role_of(row) if field == "role" else format_value(row.get(field))


def _cell(group: Group, column: str, interval: str) -> str:
    values = group.values(column)
    if not values:
        return "–"
    found = COLUMNS[column]
    if column not in VARYING:
        return found.text(statistics.fmean(values))
    mean, half_width, n = spread(values, interval)
    text = found.text(mean, half_width)
    if n == 1:
        (quartiles,) = group.values(f"{column}_iqr") or (None,)
        images = next((row.get("test_images") for row in group.rows if row.get(column)), None)
        if quartiles is not None:
            text += f" (IQR {found.text(quartiles)})"
        elif column in ACCURACIES and images and interval == "ci95":
            low, high = wilson(mean, images)
            text += f" [{found.text(low)}, {found.text(high)}]"
    return text


def _failures(group: Group) -> str:
    failed = [row for row in group.rows if row.get("error")]
    texts = [
        f"seed {row[SEED]}: {row['error']}" if len(group.rows) > 1 else str(row["error"])
        for row in failed
    ]
    return "; ".join(texts) or "–"


def caption(rows: Sequence[Row], interval: str = "ci95") -> str:
    """What the numbers of a table with measurements mean: intervals, and how many seeds."""
    groups = group_seeds([row for row in rows if row.get("top1_percent") is not None])
    counts = sorted({len(group.rows) for group in groups})
    notes = []
    if counts and counts[-1] > 1:
        seeds = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        notes.append(f"{CAPTIONS[interval]}, {seeds} seeds")
    if counts and counts[0] == 1 and interval == "ci95":
        notes.append("[…]: 95 % interval of one run's test images (Wilson)")
    return "; ".join(notes)


def terminal_table(
    headings: list[str], lines: list[list[str]], title: str = "", note: str = ""
) -> Table:
    """A table for the terminal: numbers align to the right, notes and conventions are under it."""
    notes = [FLOPS_NOTE] * any("FLOPs" in heading for heading in headings) + [note] * bool(note)
    table = Table(
        title=title or None,
        caption="\n".join(notes) or None,
        caption_justify="left",
        title_justify="left",
    )
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


def markdown_table(headings: list[str], lines: list[list[str]], note: str = "") -> str:
    """The table in Markdown, with the FLOPs convention under it."""
    numeric = [all(_is_number(line[i]) for line in lines) for i in range(len(headings))]
    rows = [headings, ["---:" if right else "---" for right in numeric], *lines]
    text = "".join("| " + " | ".join(markdown_text(c) for c in r) + " |\n" for r in rows)
    notes = [FLOPS_NOTE] * any("FLOPs" in h for h in headings) + [note] * bool(note)
    return text + "".join(f"\n{line}\n" for line in notes)


def markdown_text(text: str) -> str:
    """Text for a cell of a Markdown table: one line, without characters that have a meaning."""
    line = " ".join(text.split())
    return re.sub(r"([\\\\|<>*_`])", r"\\\1", line)


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
