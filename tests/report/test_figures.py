import io
import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sret_cli.report.figures import draw_figures, plot_rows, save_figure, svg_text
from sret_cli.runtime.errors import DATA, SretError
from sret_cli.study.file import study_from_tables
from sret_cli.study.rows import planned_row
from sret_cli.study.view import KINDS, FigureSpec, ReportSpec

pytestmark = pytest.mark.filterwarnings("error")


def rows_of(top1=lambda row: 50.0 + row["layers"] / 4 + row["train.seed"], twins=(), **grid):
    """Rows of `nano` by a grid with `__` for the dot of a key, with costs and results."""
    axes = {key.replace("__", "."): values for key, values in grid.items()}
    tables = {"model": {"preset": "nano"}, "train": {}, "twins": list(twins), "grid": axes}
    rows = [planned_row(run) for run in study_from_tables("depth", tables).runs]
    for row in rows:
        params = 330_000 if row["role"] == "shared" else 80_000 * row["layers"]
        cost = {"params": params, "macs": 10**6 * row["layers"], "activation_bytes": 1000}
        row |= {**cost, "top1_percent": top1(row), "test_loss": 1.0, "test_images": 10_000}
        row |= {"started_at": "2026", "error": None}
    return rows


def drawn(rows, kind, metrics=None, **keys):
    """The only figure of a kind."""
    report = {key: keys.pop(key) for key in ("width", "interval", "published") if key in keys}
    spec = ReportSpec(figures=(FigureSpec(kind=kind, **keys),), **report)
    (found,) = draw_figures(rows, spec, metrics or {})
    return found


def lines(axes):
    """The lines of a panel as lists of points."""
    found = [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()]
    return [[(float(x), float(y)) for x, y in line] for line in found if line]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def texts(figure):
    """All texts of a figure that are not empty."""
    found = figure.findobj(matplotlib.text.Text)
    return [text for text in found if text.get_visible() and text.get_text()]


def boxes(figure, artists):
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    return [artist.get_window_extent(renderer) for artist in artists]


def example(kind, width="page"):
    """A figure of a kind, with many series or panels where it can have them."""
    if kind == "sharing":
        rows = rows_of(
            twins=["layers", "params"],
            model__recursions=[2, 4],
            model__nll=["per_block", "none"],
            train__seed=[0, 1, 2],
        )
    elif kind.startswith("iso"):
        rows = rows_of(twins=["layers"], model__recursions=[2, 4, 8])
    else:
        rows = rows_of(
            model__recursions=[1, 2, 4, 8], train__lr=[1e-3, 2e-3, 4e-3], train__seed=[0, 1]
        )
    metrics = {
        row["run_id"]: [
            {"epoch": epoch, "top1_percent": 40.0 + epoch + row["train.seed"], "train_loss": 1.0}
            for epoch in range(1, 31)
        ]
        for row in rows
    }
    return drawn(rows, kind, metrics, width=width)


DRAWN = [kind for kind in KINDS if kind != "law"]


def test_a_line_over_the_learning_rate_joins_one_depth_and_never_averages_two():
    def top1(row):
        return 60.0 if row["layers"] == 4 else 90.0

    rows = rows_of(top1, model__recursions=[1, 4], train__lr=[1e-3, 2e-3])
    found = drawn(rows, "accuracy", x="train.lr")
    (axes,) = found.figure.axes
    assert lines(axes) == [[(0.001, 60), (0.002, 60)], [(0.001, 90), (0.002, 90)]]
    assert legend_texts(found.figure) == ["Layers:", "4", "16"]
    assert axes.get_xlabel() == "Learning rate"


def test_each_role_has_a_line_over_flops():
    rows = rows_of(twins=["layers"], model__recursions=[2, 4], train__seed=[0, 1])
    found = drawn(rows, "accuracy", x="macs")
    (axes,) = found.figure.axes
    assert lines(axes) == [[(0.008, 52.5), (0.016, 54.5)], [(0.008, 52.5), (0.016, 54.5)]]
    assert legend_texts(found.figure) == ["shared", "twin layers"]
    assert "FLOPs: one multiply-add counts as one." in found.caption


def test_further_fields_are_panels_and_not_series():
    rows = rows_of(
        twins=["layers"], model__recursions=[2, 4], model__slices=[1, 4], model__img_size=[16]
    )
    found = drawn(rows, "accuracy")
    assert [axes.get_title(loc="left") for axes in found.figure.axes] == ["Slices: 1", "Slices: 4"]
    assert legend_texts(found.figure) == ["shared", "twin layers"]
    assert [len(lines(axes)) for axes in found.figure.axes] == [2, 2]


def test_the_user_chooses_what_forms_series():
    rows = rows_of(
        model__recursions=[1, 4], train__lr=[1e-3, 2e-3], model__nll=["none", "per_pass"]
    )
    found = drawn(rows, "accuracy", group=("model.nll",))
    assert legend_texts(found.figure) == ["NLLs:", "none", "per_pass"]
    titles = [axes.get_title(loc="left") for axes in found.figure.axes]
    assert titles == ["Learning rate: 0.001", "Learning rate: 0.002"]


def test_a_panel_has_at_most_eight_series():
    rates = [0.001 * n for n in range(1, 13)]
    found = drawn(
        rows_of(model__recursions=[1, 2], train__lr=rates), "accuracy", group=("train.lr",)
    )
    assert [len(lines(axes)) for axes in found.figure.axes] == [6, 6]
    assert [axes.get_title(loc="left") for axes in found.figure.axes] == ["(1 of 2)", "(2 of 2)"]


def test_stages_that_follow_from_layers_are_folded():
    rows = rows_of(model__recursions=[[2, 2, 2], [4, 4, 4]], train__lr=[1e-3, 2e-3])
    found = drawn(rows, "accuracy", x="train.lr", group=("model.recursions",))
    assert legend_texts(found.figure) == ["Recursions:", "2", "4"]


def test_means_have_bands_between_neighbours_and_dots_for_runs():
    found = drawn(rows_of(model__recursions=[1, 8], train__seed=[0, 1, 2]), "accuracy")
    (axes,) = found.figure.axes
    assert lines(axes) == [[(4, 52), (32, 59)]]
    dots = [c.get_offsets().tolist() for c in axes.collections if len(c.get_offsets()) == 3]
    assert dots == [[[4, 51], [4, 52], [4, 53]], [[32, 58], [32, 59], [32, 60]]]
    (band,) = (c for c in axes.collections if isinstance(c, matplotlib.collections.PolyCollection))
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(59 + 2.484, abs=1e-3)
    assert found.caption == (
        "Top-1 accuracy over layers. Lines join means, dots are runs. 3 seeds. Band: 95 % "
        "confidence interval of the mean over seeds (Student's t)."
    )


def test_a_single_seed_among_several_has_no_band():
    rows = rows_of(model__recursions=[1, 2, 4], train__seed=[0, 1])
    rows = [row for row in rows if row["layers"] != 8 or row["train.seed"] == 0]
    found = drawn(rows, "accuracy", interval="sd")
    kinds = [type(c).__name__ for c in found.figure.axes[0].collections]
    assert kinds.count("LineCollection") == 2  # bars at 4 and 16
    assert "1–2 seeds. Bars: one sample standard deviation" in found.caption


def test_intervals_that_the_axis_would_cut_are_not_drawn_in_the_whole_figure():
    def top1(row):
        spread = 2 if row["layers"] == 4 else 0.1
        return 50.0 + row["layers"] / 4 + spread * row["train.seed"]

    found = drawn(rows_of(top1, model__recursions=[1, 2], train__seed=[0, 1]), "accuracy")
    (axes,) = found.figure.axes
    assert {type(c).__name__ for c in axes.collections} == {"PathCollection"}
    assert [(c.get_sizes()[0], c.get_alpha()) for c in axes.collections][1:] == [(12, 0.75)] * 2
    assert axes.get_ylim() == pytest.approx((51 - 0.12, 53 + 0.12))
    assert found.caption == (
        "Top-1 accuracy over layers. Lines join means, dots are runs. 95 % intervals (Student's t) "
        "over 2 seeds are up to ±12.71 points wide and not drawn; the table has them."
    )


def test_intervals_of_curves_that_the_axis_would_cut_are_thin_lines_of_runs():
    rows = rows_of(model__recursions=[1], train__seed=[0, 1])
    metrics = {
        row["run_id"]: [{"epoch": e, "top1_percent": 50.0 + row["train.seed"]} for e in (1, 2)]
        for row in rows
    }
    found = drawn(rows, "curves", metrics)
    (axes,) = found.figure.axes
    assert lines(axes) == [[(1, 50.5), (2, 50.5)], [(1, 50), (2, 50)], [(1, 51), (2, 51)]]
    assert len(axes.collections) == 0
    assert found.caption == (
        "Top-1 accuracy after each epoch. Means of 2 seeds. Thin lines are runs. 95 % intervals "
        "(Student's t) over 2 seeds are up to ±6.35 points wide and not drawn; the table has them."
    )


def test_a_baseline_without_depth_is_a_horizontal_line():
    rows = rows_of(model__recursions=[1, 2])
    plain = {"layers": None, "role": "baseline", "name": "resnet18", "top1_percent": 55.0}
    found = drawn([*rows, {**rows[0], **plain}], "accuracy")
    (axes,) = found.figure.axes
    assert lines(axes) == [[(4, 51), (8, 52)], [(0, 55), (1, 55)]]
    assert legend_texts(found.figure) == ["shared", "resnet18"]
    assert "Horizontal lines: means of baselines" in found.caption
    assert axes.get_ylim()[1] > 55


def test_one_test_image_is_no_mountain():
    def top1(row):
        return 95.0 + 100 / 360 * (row["layers"] == 8)

    rows = [{**row, "test_images": 360} for row in rows_of(top1, model__recursions=[1, 2])]
    low, high = drawn(rows, "accuracy").figure.axes[0].get_ylim()
    assert 2.7 < high - low < 6
    rows = [{**row, "test_images": 50_000} for row in rows]
    low, high = drawn(rows, "accuracy").figure.axes[0].get_ylim()
    assert 2.0 <= high - low < 3


def test_twins_are_compared_in_accuracy_and_in_differences_by_seed():
    def top1(row):
        return 90.0 + (row["role"] == "shared") * (1 + row["train.seed"])

    rows = rows_of(top1, twins=["layers"], model__recursions=[2, 4], train__seed=[0, 1, 2])
    found = drawn(rows, "sharing")
    top, low = found.figure.axes
    assert lines(top) == [[(8, 92), (16, 92)], [(8, 90), (16, 90)]]
    points = [line for line in low.get_lines() if line.get_marker() == "s"]
    assert [line.get_xydata().tolist() for line in points] == [[[8, 2]], [[16, 2]]]
    assert low.get_ylabel() == "Shared − control (points)"
    assert "above 0 the shared model is better" in found.caption
    assert "3 pairs of seeds at each point." in found.caption


def test_a_bar_that_is_longer_than_the_axis_ends_with_an_arrow_head():
    def top1(row):
        spread = {8: 0.1, 16: 3}[row["layers"]] * (row["role"] == "shared")
        return 90.0 + (row["role"] == "shared") + spread * row["train.seed"]

    found = drawn(
        rows_of(top1, twins=["layers"], model__recursions=[2, 4], train__seed=[0, 1]), "sharing"
    )
    low = found.figure.axes[1]
    heads = [
        c.get_offsets().tolist() for c in low.collections if type(c).__name__ == "PathCollection"
    ]
    assert heads == [[[16, 1]], [[16, 0]]]  # at the top and at the bottom of the panel
    assert low.get_ylim() == pytest.approx((-7.5 - 0.9, 7.5 + 0.9))  # 3 times 2.5, and a margin
    assert "An arrow head marks a bar that is longer than the axis." in found.caption
    assert "Bands" not in found.caption


def test_the_front_is_what_nothing_beats_and_points_have_their_depths():
    def top1(row):
        return {4: 50.0, 8: 60.0, 16: 55.0, 32: 70.0}[row["layers"]]

    found = drawn(rows_of(top1, model__recursions=[1, 2, 4, 8]), "pareto", x="macs")
    (axes,) = found.figure.axes
    assert lines(axes) == [[(0.004, 50), (0.008, 60), (0.032, 70)]]
    assert {text.get_text() for text in axes.texts} == {"4", "8", "16", "32"}
    assert legend_texts(found.figure) == ["Pareto front", "numbers: layers"]


def test_published_models_stand_behind_with_what_they_were_measured_on():
    rows = rows_of(model__recursions=[1, 2])
    found = drawn(rows, "pareto", x="macs", published=True)
    assert "ImageNet-1k at 224 px (Shen et al.; Touvron et al.; " in found.caption
    assert "Swin, published" in legend_texts(found.figure)
    assert "published" not in drawn(rows, "pareto", x="macs").caption


def test_models_of_equal_flops_are_joined_over_parameters():
    rows = rows_of(twins=["layers"], model__recursions=[2, 4])
    found = drawn(rows, "iso-flops")
    (axes,) = found.figure.axes
    assert lines(axes) == [[(0.33, 52), (0.64, 52)], [(0.33, 54), (1.28, 54)]]
    roles = ["shared", "twin layers"]
    assert legend_texts(found.figure) == ["FLOPs:", "8 M", "16 M", *roles, "numbers: layers"]
    colors = {line.get_label(): line.get_color() for line in found.figure.legends[0].get_lines()}
    assert (colors["shared"], colors["twin layers"]) == ("#0072B2", "#D55E00")  # as elsewhere


def test_models_of_equal_parameters_are_joined_within_their_role():
    rows = rows_of(twins=["layers"], model__recursions=[2, 4])
    for row in rows:
        row |= {"params": 330_000, "macs": row["macs"] * (1 + (row["role"] != "shared"))}
    found = drawn(rows, "iso-params")
    (axes,) = found.figure.axes
    assert lines(axes) == [[(0.008, 52), (0.016, 54)], [(0.016, 52), (0.032, 54)]]


def test_settings_that_share_no_line_stand_as_points():
    rows = rows_of(model__recursions=[1, 2, 4])
    rows = [
        {**row, "train.lr": 0.001 * (1 + i), "train.weight_decay": 0.01 * i}
        for i, row in enumerate(rows * 4)
    ]
    found = drawn(rows, "accuracy")
    (axes,) = found.figure.axes
    assert lines(axes) == []
    assert sum(len(c.get_offsets()) for c in axes.collections) == 12


def test_the_best_learning_rate_of_each_depth_is_marked():
    def top1(row):
        best = 4e-3 if row["layers"] == 4 else 2e-3
        return 80 - 5 * abs(math.log2(row["train.lr"] / best))

    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    found = drawn(rows_of(top1, model__recursions=[1, 4], train__lr=rates), "learning-rate")
    curves, best = found.figure.axes
    rings = [c.get_offsets().tolist() for c in curves.collections if c.get_facecolor().size == 0]
    assert rings == [[[0.004, 80]], [[0.002, 80]]]
    assert lines(best) == [[(4, 0.004), (16, 0.002)]]
    assert "Best at depth: 0.004 at 4, 0.002 at 16 layers." in found.caption
    assert "At the edge" not in found.caption


def test_learning_curves_have_means_and_bands_over_seeds():
    rows = rows_of(model__recursions=[1, 4], train__seed=[0, 1])
    metrics = {
        row["run_id"]: [
            {"step": 1, "epoch": 1, "loss": 2.0},
            *(
                {"epoch": epoch, "top1_percent": 10.0 * epoch + row["train.seed"]}
                for epoch in (1, 2, 3)
            ),
        ]
        for row in rows
    }
    found = drawn(rows, "curves", metrics)
    (axes,) = found.figure.axes
    assert lines(axes) == [[(1, 10.5), (2, 20.5), (3, 30.5)]] * 2
    assert legend_texts(found.figure) == ["Layers:", "4", "16"]
    assert found.caption.startswith("Top-1 accuracy after each epoch. Means of 2 seeds. Band:")


def test_a_heat_map_has_a_cell_for_each_pair_of_values():
    def top1(row):
        return row["layers"] + 1000 * row["train.lr"]

    rows = rows_of(top1, model__recursions=[1, 2, 4], train__lr=[1e-3, 2e-3])[:-1]
    found = drawn(rows, "heat-map")
    axes = found.figure.axes[0]
    (mesh,) = axes.collections
    cells = mesh.get_array().tolist()
    assert cells == [[5, 9, 17], [6, 10, None]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Layers", "Learning rate")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "8", "16"]
    assert "Light grey cells have no result." in found.caption


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sharing", "no shared model has a twin or baseline with the same seed"),
        ("curves", "no run has metrics of two epochs"),
        ("learning-rate", "rows with Top-1 (%) have one learning rate"),
        ("iso-flops", "no two models have equal FLOPs and different parameters"),
        ("heat-map", "fewer than two fields differ between rows with Top-1 (%)"),
    ],
)
def test_a_figure_that_rows_do_not_allow_says_why_and_what_it_needs(kind, reason):
    with pytest.raises(SretError, match=re.escape(reason) + ".*; it needs ") as caught:
        drawn(rows_of(model__recursions=[1, 2]), kind)
    assert caught.value.code == DATA
    assert "\n" not in str(caught.value)


def test_figures_are_chosen_by_the_data():
    rows = rows_of(model__recursions=[1, 2])
    assert [d.name for d in draw_figures(rows, ReportSpec())] == ["accuracy", "cost"]
    rows = rows_of(twins=["layers"], model__recursions=[2, 4, 8], train__seed=[0, 1])
    names = [d.name for d in draw_figures(rows, ReportSpec())]
    assert names == ["accuracy", "cost", "sharing", "pareto", "iso-flops"]
    rows = rows_of(model__recursions=[1, 2, 4], train__lr=[1e-3, 2e-3, 4e-3])
    names = [d.name for d in draw_figures(rows, ReportSpec(y=("top1_percent", "test_loss")))]
    assert names == ["accuracy", "cost", "test_loss", "pareto", "learning-rate"]


def test_two_figures_of_one_name_are_refused():
    figures = (FigureSpec(kind="accuracy"), FigureSpec(kind="accuracy", x="train.lr"))
    with pytest.raises(SretError, match="two figures are named 'accuracy'; give each"):
        draw_figures(rows_of(model__recursions=[1, 2]), ReportSpec(figures=figures))


def test_conditions_of_the_report_and_of_a_figure_choose_rows():
    rows = rows_of(model__recursions=[1, 2, 4], train__seed=[0, 1])
    spec = ReportSpec(where="seed == 0", figures=(FigureSpec(kind="accuracy", where="layers > 4"),))
    (found,) = draw_figures(rows, spec)
    assert lines(found.figure.axes[0]) == [[(8, 52), (16, 54)]]


@pytest.mark.parametrize("width", ["column", "page"])
@pytest.mark.parametrize("kind", DRAWN)
def test_every_kind_has_the_width_of_a_paper_readable_fonts_and_no_collisions(kind, width):
    figure = example(kind, width).figure
    assert figure.get_figwidth() == {"column": 3.25, "page": 6.75}[width]
    assert figure.get_figheight() < 9
    assert min(text.get_fontsize() for text in texts(figure)) >= 7
    panels = boxes(figure, figure.axes)
    for box in boxes(figure, figure.legends):
        assert not any(box.overlaps(panel) for panel in panels)
        assert -1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
    for axes in figure.axes:
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            shown = [t for t in labels if t.get_visible() and t.get_text()]
            for one, other in combinations(boxes(figure, shown), 2):
                assert not one.overlaps(other)
        for one, other in combinations(boxes(figure, axes.texts), 2):
            assert not one.overlaps(other)
    for box in boxes(figure, texts(figure)):
        assert box.width == 0 or (box.x0 > -2 and box.x1 < figure.bbox.x1 + 2)


def test_files_have_real_text_embedded_fonts_and_the_same_bytes_each_time(tmp_path):
    rows = rows_of(model__recursions=[1, 2], train__seed=[0, 1])
    for name in ("a", "b"):
        files = save_figure(drawn(rows, "accuracy").figure, tmp_path / name)
        assert [file.suffix for file in files] == [".png", ".svg", ".pdf"]
    for suffix in ("png", "svg", "pdf"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert re.search(rb"/MediaBox \[ 0 0 486 ", pdf)  # 6.75 inches of 72 points
    svg = (tmp_path / "a.svg").read_text()
    assert "'DejaVu Sans', 'Verdana'" in svg  # for browsers without the first
    assert re.search(r"<text [^>]*>Top-1 \(%\)</text>", svg)


def test_dots_of_runs_are_links_on_request():
    rows = rows_of(model__recursions=[1, 2], train__seed=[0, 1])
    rows[0]["run_id"] = '"><script>'
    spec = ReportSpec(figures=(FigureSpec(kind="accuracy"),))
    (found,) = draw_figures(rows, spec, links=True)
    svg = svg_text(found.figure)
    assert svg.startswith("<svg")
    tree = ElementTree.parse(io.StringIO(svg))
    name = "{http://www.w3.org/1999/xlink}href"
    links = [e.get(name) for e in tree.iter("{http://www.w3.org/2000/svg}a")]
    assert sorted(links) == sorted(f"#run-{row['run_id']}" for row in rows)
    assert "#run-" not in svg_text(drawn(rows, "accuracy").figure)


HOSTILE = [
    "../../etc",
    "$x_{1}$ \\frac",
    "a_b_c",
    "'\"",
    "<script>",
    "two\nlines\x00",
    "é" * 90,
    "名",
]


def test_hostile_names_are_plain_short_texts(tmp_path):
    rows = []
    for name in HOSTILE:
        rows += [{**row, "name": name} for row in rows_of(model__recursions=[1, 2])]
    found = drawn(rows, "accuracy", group=("name",))
    assert legend_texts(found.figure) == [
        *("../../etc", "$x_{1}$ \\frac", "a_b_c", "'\""),
        *("<script>", "two lines", "é" * 33 + "…", "名"),
    ]
    svg = save_figure(found.figure, tmp_path / "hostile")[1].read_text()
    assert "$x_{1}$ \\frac" in svg and "&lt;script&gt;" in svg and "<script>" not in svg


def test_long_names_stay_different_when_they_are_shortened():
    names = [
        "vit_base_patch16_clip_224.laion2b_ft_in1k",
        "vit_base_patch16_clip_224.laion2b_ft_in12k",
    ]
    rows = [{**row, "name": name} for name in names for row in rows_of(model__recursions=[1, 2])]
    one, other = legend_texts(drawn(rows, "accuracy", group=("name",)).figure)
    assert one != other and max(len(one), len(other)) <= 38


@pytest.mark.parametrize("value", [math.nan, math.inf, None, 1e308, 10**400, "text", True, 50.0])
@pytest.mark.parametrize("column", ["top1_percent", "macs", "layers", "step_seconds"])
def test_hostile_values_are_left_out_or_drawn(column, value, tmp_path):
    rows = rows_of(model__recursions=[1, 2, 4], train__seed=[0, 1])
    for row in rows[:2]:
        row[column] = value
    for found in draw_figures(rows, ReportSpec()):
        assert svg_text(found.figure)


@pytest.mark.parametrize("x", [[0, 1, 10, 100], [-5, 1, 10, 100], [7, 7, 7, 7], [1e-12, 1, 1e9, 2]])
@pytest.mark.parametrize("y", [[0.0] * 4, [0.0, 1e-9, 1.0, 1e9], [-1.0, 0.0, 1.0, 2.0]])
def test_any_numbers_can_be_axes(x, y):
    rows = rows_of(model__recursions=[1, 2, 4, 8])
    for row, a, b in zip(rows, x, y, strict=True):
        row |= {"step_seconds": a, "test_loss": b}
    found = drawn(rows, "loss", x="step_seconds")
    assert svg_text(found.figure)


def test_no_rows_and_no_results_draw_nothing():
    assert draw_figures([], ReportSpec()) == []
    rows = [{**row, "top1_percent": None} for row in rows_of(model__recursions=[1, 2])]
    assert [d.name for d in draw_figures(rows, ReportSpec())] == ["cost"]


def test_an_evaluation_has_one_panel_for_each_column():
    rows = rows_of(model__recursions=[1, 2, 4])
    figure = plot_rows(rows, "layers", ["top1_percent", "test_loss"])
    accuracy, loss = figure.axes
    assert (accuracy.get_ylabel(), loss.get_ylabel()) == ("Top-1 (%)", "Test loss")
    assert lines(accuracy) == [[(4, 51), (8, 52), (16, 54)]]
