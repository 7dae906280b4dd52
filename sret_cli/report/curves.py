"""Learning curves of the runs in a directory."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from sret_cli.report.figures import COLORS, save_figure, series_style
from sret_cli.runtime.files import make_directory


def write_training_figure(run_directory: Path, directory: Path) -> list[Path]:
    """Draws a run's losses and test accuracy from its `metrics.jsonl`; returns the files.

    Returns no files if the directory has no metrics of a finished epoch.
    """
    path = run_directory / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step" in line]
    epochs = [line for line in lines if "top1_percent" in line]
    if not epochs:
        return []
    with series_style():
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        per_epoch = sum(line["epoch"] == epochs[0]["epoch"] for line in steps)
        at = [line["step"] / per_epoch for line in steps]
        loss.plot(at, [s["loss"] for s in steps], color=COLORS[0], alpha=0.35, label="each step")
        ends = [line["epoch"] for line in epochs]
        loss.plot(ends, [e["train_loss"] for e in epochs], color=COLORS[0], label="epoch's mean")
        loss.plot(ends, [e["test_loss"] for e in epochs], color=COLORS[1], label="test")
        loss.set(xlabel="Epoch", ylabel="Loss")
        loss.legend()
        accuracy.plot(ends, [e["top1_percent"] for e in epochs], marker="o", color=COLORS[1])
        accuracy.set(xlabel="Epoch", ylabel="Top-1 (%)")
        return save_figure(figure, make_directory(directory) / "training")
