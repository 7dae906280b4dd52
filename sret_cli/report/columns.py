"""How people read rows: headings, units, and groups of runs that differ in their seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sret_cli.spec.run import Row
from sret_cli.study.axes import format_value

FLOPS_NOTE = "FLOPs: one multiply-add counts as one."


@dataclass(frozen=True)
class Column:
    """How a measurement is shown: heading with unit, divisor to that unit, decimals."""

    heading: str
    divisor: float
    decimals: int

    def text(self, value: float, deviation: float = 0.0) -> str:
        """The value in the column's unit, with its deviation unless that is 0."""
        shown, decimals = value / self.divisor, self.decimals
        if decimals > 1 and 0 < abs(shown) < 0.1:  # three significant digits
            decimals = 2 - math.floor(math.log10(abs(shown)))
        spread = f" ± {deviation / self.divisor:,.{decimals}f}" if deviation else ""
        return f"{shown:,.{decimals}f}{spread}"


COLUMNS = {
    "recursions": Column("Recursions", 1, 0),
    "layers": Column("Layers", 1, 0),
    "params": Column("Params (M)", 1e6, 2),
    "macs": Column("FLOPs (G)", 1e9, 3),
    "activations": Column("Activations (M)", 1e6, 2),
    "activation_bytes": Column("Kept for backward (MB/image)", 1e6, 2),
    "peak_memory_bytes": Column("Peak memory (MB)", 1e6, 0),
    "measured_batch_size": Column("Batch", 1, 0),
    "forward_seconds": Column("Forward (ms)", 1e-3, 1),
    "step_seconds": Column("Training step (ms)", 1e-3, 1),
    "inference_images_per_second": Column("Inference (images/s)", 1, 1),
    "training_images_per_second": Column("Training (images/s)", 1, 1),
    "images_per_second": Column("Training run (images/s)", 1, 0),
    "memory_batch_size": Column("Batch", 1, 0),
    "weight_bytes": Column("Weights (MB)", 1e6, 0),
    "gradient_bytes": Column("Gradients (MB)", 1e6, 0),
    "optimizer_bytes": Column("Optimizer (MB)", 1e6, 0),
    "kept_bytes": Column("Kept for backward (MB)", 1e6, 0),
    "transient_bytes": Column("Transient (MB)", 1e6, 0),
    "training_memory_bytes": Column("Training step (MB)", 1e6, 0),
    "inference_memory_bytes": Column("Inference (MB)", 1e6, 0),
    "largest_batch": Column("Largest batch", 1, 0),
    "epochs_trained": Column("Epochs", 1, 0),
    "train_seconds": Column("Training (s)", 1, 0),
    "final_loss": Column("Training loss", 1, 3),
    "test_loss": Column("Test loss", 1, 3),
    "top1_percent": Column("Top-1 (%)", 1, 2),
    "top5_percent": Column("Top-5 (%)", 1, 2),
    "mean_class_top1_percent": Column("Mean per-class top-1 (%)", 1, 2),
    "best_top1_percent": Column("Best top-1 of all epochs (%)", 1, 2),
    "ema_test_loss": Column("Test loss, averaged weights", 1, 3),
    "ema_top1_percent": Column("Top-1, averaged weights (%)", 1, 2),
    "ema_top5_percent": Column("Top-5, averaged weights (%)", 1, 2),
    "test_images": Column("Test images", 1, 0),
    "published_gmacs": Column("Published FLOPs (G)", 1, 1),
    "published_params_m": Column("Published params (M)", 1, 1),
    "params_m_minus_published": Column("Params − published (M)", 1, 1),
    "gmacs_minus_published": Column("FLOPs − published (G)", 1, 1),
    "published_top1_percent": Column("Published top-1 (%)", 1, 1),
    "published_distilled_top1_percent": Column("Published top-1, distilled (%)", 1, 1),
}


def heading(column: str) -> str:
    """The heading of a column, or the label of an axis."""
    if column == "name":
        return "Model"
    return COLUMNS[column].heading if column in COLUMNS else column.partition(".")[2] or column


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    fields: dict[str, str]
    rows: list[Row]

    def values(self, column: str) -> list[float]:
        """The values of the runs that measured this column."""
        return [row[column] for row in self.rows if row.get(column) is not None]


def group_seeds(rows: Sequence[Row], fields: Sequence[str]) -> list[Group]:
    """Groups of rows with equal values in `fields` and equal layers, in the order of the rows."""
    groups: dict[tuple, Group] = {}
    for row in rows:
        shown = {key: format_value(row.get(key)) for key in fields}
        key = (*shown.values(), row["layers"])
        groups.setdefault(key, Group(shown, [])).rows.append(row)
    return list(groups.values())


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
