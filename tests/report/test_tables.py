import csv
import io

import matplotlib
import pytest

from sret_cli.report.columns import COLUMNS
from sret_cli.report.curves import write_training_figure
from sret_cli.report.figures import plot_rows, save_figure
from sret_cli.report.tables import csv_text, markdown_table, table_cells
from sret_cli.report.write import write_report
from sret_cli.study.axes import varying_fields
from sret_cli.study.file import study_from_tables
from sret_cli.study.rows import planned_row
from sret_cli.study.view import ReportSpec


def rows(**values):
    """The rows of a study of two depths and two seeds, with top-1 90, 92, 94 and 94 %."""
    tables = {
        "model": {"preset": "nano"},
        "train": {},
        "grid": {"model.recursions": [1, 8], "train.seed": [0, 1]},
    }
    made = [planned_row(run) for run in study_from_tables("depth", tables).runs]
    for row, top1 in zip(made, (90.0, 92.0, 94.0, 94.0), strict=True):
        cost = {"params": 331_842, "macs": 10**6 * row["layers"], "activation_bytes": 1000}
        row |= {**cost, "top1_percent": top1, "started_at": "2026", **values}
    return made


def test_seeds_are_one_line_with_the_interval_of_their_mean():
    headings, lines = table_cells(rows(), ("layers", "macs", "top1_percent", "step_seconds"))
    assert headings == ["Model", "Seeds", "Layers", "FLOPs (G)", "Top-1 (%)"]
    assert lines == [
        ["nano", "2", "4", "0.00400", "91.00 ± 12.71"],  # t = 12.71, deviation / sqrt(2) = 1
        ["nano", "2", "32", "0.0320", "94.00 ± 0.00"],
    ]


def test_a_value_that_was_not_measured_is_a_dash_and_a_failed_run_says_why():
    made = rows()
    made[0] |= {"top1_percent": None, "error": "out of memory"}
    made[1] |= {"top1_percent": None}
    headings, lines = table_cells(made, ("layers", "top1_percent"))
    assert headings == ["Model", "Seeds", "Layers", "Top-1 (%)", "Failed"]
    assert lines[0] == ["nano", "1", "4", "–", "seed 0: out of memory"]
    assert lines[1] == ["nano", "2", "32", "94.00 ± 0.00", "–"]


def test_fields_that_vary_are_columns_unless_they_follow_from_another():
    made = rows()
    assert varying_fields(made) == []
    for row in made[2:]:
        row["model.nll"] = "none"
    assert varying_fields(made) == ["model.nll"]
    for row in made[2:]:
        row["name"] = "bare"
    assert varying_fields(made) == ["name"]


@pytest.mark.parametrize(
    ("column", "value", "deviation", "text"),
    [
        ("params", 14_657_700, None, "14.66"),
        ("macs", 166_367_070_720, None, "166.367"),
        ("macs", 4_574_208, None, "0.00457"),
        ("layers", 1000, None, "1,000"),
        ("top1_percent", 98.0555, 0.39, "98.06 ± 0.39"),
        ("step_seconds", 0.0507, None, "50.7"),
        ("top1_percent", 98.0555, 0.0, "98.06 ± 0.00"),
    ],
)
def test_values_are_shown_in_their_unit(column, value, deviation, text):
    assert COLUMNS[column].text(value, deviation) == text


def test_csv_keeps_every_row_and_every_digit():
    made = rows(final_loss=0.1234567890123456)
    read = list(csv.DictReader(io.StringIO(csv_text(made))))
    assert len(read) == 4
    assert read[0]["final_loss"] == "0.1234567890123456"
    assert read[0]["model.embed_dims"] == "[32, 64, 128]"
    assert read[0]["peak_memory_bytes"] == ""


def test_markdown_is_a_table_with_the_convention_under_it():
    text = markdown_table(*table_cells(rows(), ("layers", "macs")))
    assert text.splitlines() == [
        "| Model | Seeds | Layers | FLOPs (G) |",
        "| --- | ---: | ---: | ---: |",
        "| nano | 2 | 4 | 0.00400 |",
        "| nano | 2 | 32 | 0.0320 |",
        "",
        "FLOPs: one multiply-add counts as one.",
    ]


def test_a_report_is_a_table_and_figures(tmp_path):
    files = write_report(rows(), ReportSpec(y=("top1_percent", "final_loss")), tmp_path)
    names = ["table.md", "table.csv", "accuracy.png", "accuracy.svg", "cost.png", "cost.svg"]
    assert [file.name for file in files] == names
    assert all(file.stat().st_size > 100 for file in files)


def test_a_column_with_a_dot_in_its_name_has_its_own_figure(tmp_path):
    files = write_report(rows(), ReportSpec(y=("train.lr", "model.nll_ratio")), tmp_path)
    assert {"train.lr.png", "model.nll_ratio.svg"} <= {file.name for file in files}


def test_figures_have_units_markers_for_runs_and_a_band_for_seeds():
    figure = plot_rows(rows(), "layers", ["top1_percent", "macs"])
    accuracy, cost = figure.axes
    assert (accuracy.get_xlabel(), accuracy.get_ylabel()) == ("Layers", "Top-1 (%)")
    assert cost.get_ylabel() == "FLOPs (G)"
    assert (accuracy.get_xscale(), accuracy.get_yscale()) == ("log", "linear")
    assert cost.get_yscale() == "log"
    markers = [c.get_offsets() for c in accuracy.collections if len(c.get_offsets()) > 1]
    assert [[tuple(p) for p in m.tolist()] for m in markers] == [
        [(4, 90), (4, 92)],
        [(32, 94), (32, 94)],
    ]
    bands = [
        c for c in accuracy.collections if isinstance(c, matplotlib.collections.PolyCollection)
    ]
    assert len(bands) == 1
    assert figure.legends == []
    assert figure.get_supxlabel() == (
        "FLOPs: one multiply-add counts as one. Band: 95 % confidence interval of the mean over "
        "seeds (Student's t)."
    )
    low, high = accuracy.get_ylim()
    assert 0 <= low < high <= 100


def test_runs_that_differ_in_more_than_depth_are_series_with_a_legend():
    made = rows() + rows(**{"model.nll": "none"})
    figure = plot_rows(made, "layers", ["top1_percent"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["per_block", "none"]
    assert legend.get_title().get_text() == "nll"


def test_twins_are_one_series_over_the_depths_of_the_models_that_they_control():
    tables = {"model": {"preset": "nano"}, "train": {}, "twins": ["layers"]}
    tables["grid"] = {"model.recursions": [2, 4], "train.seed": [0, 1]}
    made = [planned_row(run) for run in study_from_tables("depth", tables).runs]
    for row in made:
        row |= {"top1_percent": 90.0 + row["train.seed"]}
    figure = plot_rows(made, "layers", ["top1_percent"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["shared", "twin layers"]
    lines = [line.get_xdata().tolist() for line in figure.axes[0].get_lines()]
    assert [line for line in lines if line] == [[8, 16], [8, 16]]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_figure(plot_rows(rows(), "layers", ["top1_percent"]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_run_has_a_figure_of_its_training(tmp_path):
    assert write_training_figure(tmp_path, tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 1, "loss": 2.0, "lr": 0.1}\n'
        '{"step": 2, "epoch": 1, "loss": 1.5, "lr": 0.1}\n'
        '{"epoch": 1, "train_loss": 1.75, "test_loss": 1.4, "top1_percent": 50.0}\n'
    )
    files = write_training_figure(tmp_path, tmp_path / "report")
    assert [f.name for f in files] == ["training.png", "training.svg"]


def test_steps_of_an_unfinished_epoch_lie_after_the_finished_ones(tmp_path, monkeypatch):
    step = '{{"step": {0}, "epoch": {1}, "loss": 2.0, "lr": 0.1}}\n'
    epoch = '{"epoch": 1, "train_loss": 1.75, "test_loss": 1.4, "top1_percent": 50.0}\n'
    lines = [step.format(1, 1), step.format(2, 1), epoch, step.format(3, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    drawn = []
    monkeypatch.setattr(
        "sret_cli.report.curves.save_figure", lambda figure, stem: drawn.append(figure) or []
    )
    write_training_figure(tmp_path, tmp_path)
    assert drawn[0].axes[0].get_lines()[0].get_xdata().tolist() == [0.5, 1.0, 1.5]
