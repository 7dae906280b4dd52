"""The content of a small page, for the tests of the HTML report."""

import io

from matplotlib.figure import Figure

from sret_cli.report.page import PageContent, PageFigure, PageRun, PageTable
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.rows import planned_row
from sret_cli.training.config import run_config

QUESTION = """What does depth buy?

One model reads digits
at three depths.

  sret run studies/depth.toml        3 runs
"""
SCRIPT = "<script>alert(1)</script>"


def metrics_of(epochs):
    return [
        {
            **{"epoch": epoch, "train_loss": 2 / epoch, "test_loss": 2.5 / epoch},
            **{"top1_percent": 90 - 60 / epoch, "test_images": 360},
        }
        for epoch in range(1, epochs + 1)
    ]


def page_run(recursions=2, seed=0, name="nano", run_id=None, epochs=3, **measured):
    """A finished run of `nano`, with a row and a config as `sret` writes them."""
    spec = PRESETS["nano"].with_values(recursions=recursions)
    run = Run("depth", name, spec, TrainSpec(seed=seed, epochs=epochs))
    row = planned_row(run) | {
        **{"params": 333_000, "macs": 4_000_000 * recursions, "status": "done"},
        **{"top1_percent": 50.0 + recursions, "test_loss": 1.5, "train_seconds": 125.0},
        **{"sret_version": "0.1.0", "torch_version": "2.11.0", "python_version": "3.12.1"},
        **{"device_name": "CPU, 1 threads", "git_commit": "a" * 40},
        **{"started_at": "2026-01-01T00:00:00+00:00"},
        **measured,
    }
    row["run_id"] = run.run_id if run_id is None else run_id
    return PageRun(row, run_config(run), metrics_of(epochs))


def figure_svg(runs):
    """Matplotlib's SVG of top-1 over layers, each point a link to its run."""
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    rows = [run.row for run in runs]
    layers = [row["layers"] for row in rows]
    points = axes.scatter(layers, [row["top1_percent"] for row in rows], color="#0072B2")
    points.set_urls([f"#run-{row['run_id']}" for row in rows])
    axes.plot(layers, [row["top1_percent"] for row in rows], color="0.4")
    axes.set(xlabel="Layers", ylabel="Top-1 (%)")
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


def page_content(runs=None, **values):
    """A page with two figures, a table of layers that sort otherwise as texts, and all parts."""
    if runs is None:
        runs = [page_run(recursions) for recursions in (4, 25, 2)]
    layers = [str(run.row["layers"]) for run in runs]
    table = PageTable(
        "Results",
        ["Run", "Layers", "Top-1 (%)"],
        [[run.row["run_id"], n, "52.0 ± 0.3"] for run, n in zip(runs, layers, strict=True)],
        "±: half of the interval.",
    )
    figures = [PageFigure("Accuracy", "Top-1 over layers.", figure_svg(runs))] * 2
    content = {
        **{"title": "depth", "question": QUESTION, "answers": ["Depth buys 2.1 ± 0.8 points."]},
        **{"figures": figures, "tables": [table], "runs": runs},
        **{"missing": ["nano, 400 layers, seed 0"], "notes": ["One multiply-add counts as one."]},
    }
    return PageContent(**{**content, **values})
