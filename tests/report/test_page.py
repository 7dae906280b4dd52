import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from pages import SCRIPT, figure_svg, page_content, page_run

from sret_cli.report.page import PageFigure, PageTable, page_html, write_page


class Page(HTMLParser):
    """Ids, links, headings and visible text of a page."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.headings, self.tags, self.text = [], [], [], [], ""
        self.hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "a":
            self.links.append(attributes.get("href"))
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.text += " " if tag in ("td", "th") else ""
        self.hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        self.text += "" if self.hidden else data

    def words(self):
        return " ".join(self.text.split())

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def html():
    return page_html(page_content())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_question_and_the_answer_come_first(page):
    parts = ["What does depth buy?", "sret run studies/depth.toml", "Depth buys 2.1 ± 0.8 points."]
    parts += ["4 runs: 3 finished, 1 missing.", "Top-1 over layers.", "±: half of the interval."]
    parts += ["nano, 400 layers, seed 0", "All runs", "This command trains the run alone:"]
    places = [page.words().index(part) for part in parts]
    assert places == sorted(places)
    assert "One model reads digits at three depths." in page.words()


def test_headings_skip_no_level(page):
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    steps = zip(page.headings, page.headings[1:], strict=False)
    assert all(after - before <= 1 for before, after in steps)


def test_each_id_is_there_once_and_each_link_has_its_target(html, page):
    assert len(page.ids) == len(set(page.ids)) > 20
    assert {link[1:] for link in page.links if link} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)
    assert all(a["href"][1:] in page.ids for a in page.all("use"))
    assert {a["aria-labelledby"] for t, a in page.tags if "aria-labelledby" in a} <= set(page.ids)


def test_nothing_is_requested_and_no_address_is_in_the_page(html, page):
    assert "http://" not in html and "https://" not in html
    assert not page.all("link") and not page.all("img") and not page.all("iframe")
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy["content"].partition("style-src")[0]


def test_equal_content_gives_equal_bytes(html, tmp_path):
    write_page(page_content(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == html.encode()


def test_a_name_with_a_script_stays_text():
    evil = page_run(name=SCRIPT, run_id=f'{SCRIPT}"\n../x', error=f"{SCRIPT} failed")
    content = page_content(
        [evil, page_run(4)],
        title=SCRIPT,
        question=SCRIPT,
        answers=[SCRIPT],
        missing=[SCRIPT],
        notes=[SCRIPT],
    )
    content = replace(content, tables=[PageTable(SCRIPT, [SCRIPT], [[SCRIPT]], SCRIPT)])
    html = page_html(content)
    assert SCRIPT not in html
    assert len(Page(html).all("script")) == 2  # the page's own, and the packed DataTables
    assert Page(html).text.count(SCRIPT) > 8


def test_ids_of_hostile_runs_are_plain_and_differ():
    runs = [page_run(run_id=run_id) for run_id in ('a"b', "a<b", "../a b", "", "é", "a-b")]
    found = Page(page_html(page_content(runs)))
    anchors = [a["id"] for a in found.all("details", **{"class": "run"})]
    assert anchors == ["run-a-b", "run-a-b-2", "run--a-b", "run-unnamed", "run--", "run-a-b-3"]
    assert len(found.ids) == len(set(found.ids))


def test_a_point_is_a_link_to_its_run_with_a_tooltip(page):
    run = page_run(4)
    tip = f"nano, shared, 16 layers, seed 0: top-1 54.00 % (run {run.row['run_id']})"
    points = page.all("a", **{"class": "point", "aria-label": tip})
    assert [point["href"] for point in points] == [f"#run-{run.row['run_id']}"] * 2
    assert tip in page.text  # its title, for browsers without scripts


def test_a_link_to_an_unknown_run_is_no_link():
    svg = figure_svg([page_run(8)])
    html = page_html(page_content(figures=[PageFigure("Accuracy", "", svg)]))
    assert None in Page(html).links


def test_black_white_and_grey_follow_the_theme_and_colours_stay(html):
    figure = re.search("<figure.*?</figure>", html, re.DOTALL)[0]
    assert "currentColor" in figure and "var(--paper)" in figure and "#0072b2" in figure
    assert "color-mix(in srgb, currentColor 60%, var(--paper))" in figure  # 0.4
    assert "#000000" not in figure and "#ffffff" not in figure and "<style" not in figure


def test_a_figure_with_a_colour_map_stays_light():
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><g id="QuadMesh_1"/></svg>'
    html = page_html(page_content(figures=[PageFigure("Map", "", svg)]))
    assert '<figure class="light">' in html


def test_characters_that_xml_does_not_have_are_left_out():
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><!-- a\x00b --><text>c\x1bd</text></svg>'
    assert "<text>cd</text>" in page_html(page_content(figures=[PageFigure("Odd", "", svg)]))


def test_scripts_and_addresses_in_an_svg_are_left_out():
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'onload="alert(1)"><script>alert(1)</script><a xlink:href="javascript:alert(1)"/>'
        '<image xlink:href="https://example.org/a.png"/></svg>'
    )
    html = page_html(page_content(figures=[PageFigure("Evil", "", svg)]))
    assert "alert(1)" not in html and "example.org" not in html and "onload" not in html


def test_a_run_has_what_differs_first_and_the_rest_once(html, page):
    (run,) = re.findall(r'<details class="run" id="run-.*?</div></details>', html, re.DOTALL)[:1]
    text = Page(run).words()
    assert "Settings in which runs differ model.recursions 4-4-4" in text
    assert "model.mlp_ratio" not in text and "other settings" in text
    assert page.words().count("model.mlp_ratio") == 1


def test_a_run_has_its_provenance_and_the_command_to_train_it(page):
    for part in (
        "sret 0.1.0 torch 2.11.0 Python 3.12.1 Device CPU, 1 threads",
        f"Commit {'a' * 40} Started 2026-01-01T00:00:00+00:00",
        "Duration of the training 2 min 5 s",
        "sret train --preset nano --num-classes 10 --epochs 3 --set 'model.recursions=[4, 4, 4]'",
    ):
        assert part in page.words()


def test_failed_and_missing_runs_have_their_reasons():
    failed = page_run(4, status="diverged", error="the loss is not finite", top1_percent=None)
    page = Page(page_html(page_content([page_run(2), failed], figures=[])))
    assert "3 runs: 1 finished, 1 failed, 1 missing." in page.words()
    assert "nano, shared, 16 layers, seed 0: the loss is not finite" in page.words()
    assert f"#run-{failed.row['run_id']}" in page.links


def test_runs_that_differ_in_a_setting_are_told_apart_by_it():
    one, other = page_run(2), page_run(2, run_id="other")
    config = {**other.config, "train": {**other.config["train"], "lr": 0.01}}
    page = Page(page_html(page_content([one, replace(other, config=config)])))
    assert "nano, shared, 8 layers, seed 0, lr 0.01: top-1 52.00 % (run other)" in page.text


def test_runs_of_one_depth_by_different_recursions_are_told_apart():
    deep, wide = page_run(2), page_run(2, run_id="other")
    config = {**wide.config, "model": {**wide.config["model"], "recursions": [1, 3, 1]}}
    page = Page(page_html(page_content([deep, replace(wide, config=config)])))
    assert "seed 0, recursions 1-3-1: top-1 52.00 % (run other)" in page.text


def test_what_only_follows_from_the_depth_is_not_repeated(page):
    assert "recursions" not in "".join(a["aria-label"] for a in page.all("a", **{"class": "point"}))


def test_a_run_that_was_only_profiled_has_no_command_and_no_curves():
    run = page_run(2, top1_percent=None, **{"train.seed": None})
    row = {key: value for key, value in run.row.items() if not key.startswith("train.")}
    html = page_html(page_content([replace(run, row=row, config=None, metrics=[])], figures=[]))
    assert "sret train" not in html and "<polyline" not in html


def test_a_run_without_a_config_or_metrics_shows_its_row():
    run = replace(page_run(2), config=None, metrics=[])
    page = Page(page_html(page_content([run], figures=[])))
    assert "--set" not in page.words() and "sret train --preset nano" in page.words()
    assert "model.mlp_ratio 3" in page.words()


def test_columns_of_numbers_sort_by_their_values():
    lines = [["a", "1,024", "9.5 ± 0.1", "1-2-1"], ["b", "–", "10.0 ± 0.2", "2-2-2"]]
    table = PageTable("Sorted", ["Name", "Layers", "Top-1", "blocks"], lines)
    html = page_html(page_content(tables=[table]))
    for cell in ('"1024.0">1,024', '"">–', '"9.5">9.5 ± 0.1', '"10.0">10.0 ± 0.2'):
        assert f'<td class="n" data-order={cell}</td>' in html
    assert "<td>1-2-1</td>" in html


def test_raw_values_replace_the_order_of_texts():
    table = PageTable("Sorted", ["Size"], [["1 GB"], ["2 MB"]], sort_values=[[1e9], [2e6]])
    html = page_html(page_content(tables=[table]))
    assert 'data-order="1000000000.0">1 GB' in html and 'data-order="2000000.0">2 MB' in html


def test_a_page_without_runs_says_so():
    content = page_content([], figures=[], tables=[], answers=[], missing=["nano"], question="")
    assert "1 run: 0 finished, 1 missing." in Page(page_html(content)).words()


def test_three_hundred_runs_of_a_hundred_epochs_stay_under_five_megabytes():
    runs = [page_run(1 + i % 30, seed=i // 30, run_id=f"{i:010x}", epochs=100) for i in range(300)]
    html = page_html(page_content(runs))
    assert 1e6 < len(html.encode()) < 5e6
    assert html.count("<polyline") == 300 * 3
