"""The columns of the commands' tables, and the tables of a model's cost and of classes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from sret_cli.report.columns import COLUMNS, FLOPS_NOTE
from sret_cli.report.formats import csv_text
from sret_cli.report.table import is_number
from sret_cli.spec.run import Row

if TYPE_CHECKING:
    from sret_cli.cost.breakdown import Profile

COST_TABLE = (
    *("params", "published_params_m", "macs", "published_gmacs", "activations"),
    *("activation_bytes", "measured_batch_size", "forward_seconds", "step_seconds"),
    *("inference_images_per_second", "training_images_per_second", "peak_memory_bytes"),
)
MEMORY_TABLE = (
    *("memory_batch_size", "weight_bytes", "gradient_bytes", "optimizer_bytes"),
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
        numeric = all(is_number(line[index]) for line in lines)
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
