"""The page in a real browser: Debian's `chromium`, without a window."""

import shutil
from dataclasses import replace

import pytest
from pages import SCRIPT, page_content, page_run

from sret_cli.report.page import write_page

CHROMIUM = shutil.which("chromium")
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or sync_playwright is None, reason="needs chromium and playwright"
)
COLORS = {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 20, 25)"}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a page of content; at the end, nothing may have failed or been requested."""
    complaints, requests, contexts = [], [], []

    def open_content(content=None, fragment="", ready=True, **options):
        path = tmp_path / "report.html"
        write_page(content or page_content(), path)
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{path.as_uri()}{fragment}")
        if ready:
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_content
    for context in contexts:
        context.close()
    allowed = f"{(tmp_path / 'report.html').as_uri()}"
    others = [url for url in requests if not url.startswith((allowed, "blob:null/"))]
    assert (complaints, others) == ([], [])


def many_runs():
    return [page_run(n, run_id=f"{n:010}", top1_percent=100.0 - n) for n in range(1, 9)]


def column(page, table, number):
    return page.locator(f"#{table} tbody tr > :nth-child({number})")


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_a_column_of_numbers_sorts_as_numbers(open_page):
    page = open_page()
    expect(column(page, "table-1", 2)).to_have_text(["16", "100", "8"])
    heading = page.get_by_role("columnheader", name="Layers").first
    heading.get_by_role("button").click()
    expect(column(page, "table-1", 2)).to_have_text(["8", "16", "100"])
    expect(heading).to_have_attribute("aria-sort", "ascending")
    page.keyboard.press("Enter")  # the heading has the focus
    expect(column(page, "table-1", 2)).to_have_text(["100", "16", "8"])


def test_the_filter_leaves_the_lines_and_runs_that_match(open_page):
    page = open_page(page_content(many_runs()))
    page.get_by_label("Filter: All runs").fill("0000000003")
    expect(column(page, "all-runs", 1)).to_have_text(["0000000003"])
    assert page.locator("details.run:visible").count() == 1
    assert page.get_by_text("1 of 8").is_visible()
    page.get_by_label("Filter: All runs").fill("")
    expect(column(page, "all-runs", 1)).to_have_count(8)


def test_a_point_opens_its_run_by_mouse_and_by_keyboard(open_page):
    page = open_page(page_content(many_runs()))
    page.locator("#figures ~ figure a.point").nth(2).click()
    run = page.locator("#run-0000000003")
    assert run.get_attribute("open") is not None and run.locator(".curve").first.is_visible()
    page.wait_for_function("document.activeElement.closest('#run-0000000003')")
    page.locator("a.point").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#run-0000000002[open]")


def test_a_filtered_run_appears_again_when_it_is_linked(open_page):
    page = open_page(page_content(many_runs()))
    page.get_by_label("Filter: All runs").fill("0000000003")
    page.locator("a.point").first.click()
    page.wait_for_selector("#run-0000000001[open]")
    assert page.locator("#run-0000000001").is_visible()


def test_an_address_with_a_run_opens_it(open_page):
    page = open_page(page_content(many_runs()), fragment="#run-0000000007")
    run = page.locator("#run-0000000007")
    assert run.get_attribute("open") is not None
    assert 0 <= run.bounding_box()["y"] < 400


def test_a_tooltip_appears_on_hover_and_on_focus(open_page):
    page = open_page(page_content(many_runs()))
    tooltip, point = page.get_by_role("tooltip"), page.locator("a.point").nth(1)
    assert not tooltip.is_visible()
    point.hover()
    assert tooltip.inner_text() == (
        "nano, shared, 8 layers, seed 0: top-1 98.00 % (run 0000000002)"
    )
    page.mouse.move(0, 0)
    assert not tooltip.is_visible()
    point.focus()
    assert tooltip.is_visible()
    page.keyboard.press("ArrowRight")
    assert "run 0000000003" in tooltip.inner_text()
    page.keyboard.press("Escape")
    assert not tooltip.is_visible()


def test_the_nearest_point_is_meant(open_page):
    page = open_page(page_content(many_runs()))
    page.locator("a.point").nth(4).scroll_into_view_if_needed()
    place = page.locator("a.point").nth(4).bounding_box()
    page.mouse.move(place["x"] - 6, place["y"])
    assert "run 0000000005" in page.get_by_role("tooltip").inner_text()
    page.mouse.click(place["x"] - 6, place["y"])
    page.wait_for_selector("#run-0000000005[open]")


def test_a_figure_is_one_stop_of_the_tab_key(open_page):
    page = open_page(page_content(many_runs()))
    stops = page.locator("figure").first.locator("a.point:not([tabindex='-1'])")
    assert stops.count() == 1
    page.locator("a.point").first.focus()
    page.keyboard.press("End")
    assert "0000000008" in page.evaluate("document.activeElement.getAttribute('href')")


def test_the_common_settings_unfold_in_a_run(open_page):
    page = open_page()
    page.locator("details.run > summary").first.click()
    run = page.locator("details.run").first
    run.get_by_text("other settings").click()
    run.get_by_text("model.mlp_ratio").wait_for()


def test_a_name_with_a_script_is_shown_and_not_run(open_page):
    run = page_run(name=SCRIPT, run_id=f'"{SCRIPT}', error=SCRIPT)
    page = open_page(page_content([run, page_run(8)], title=SCRIPT, question=SCRIPT))
    assert page.get_by_role("heading", level=1).inner_text() == SCRIPT
    assert page.locator("#all-runs").get_by_text(SCRIPT).first.is_visible()
    page.locator("a.point").first.hover()
    assert SCRIPT in page.get_by_role("tooltip").inner_text()


def test_a_script_that_got_into_the_page_would_not_run(open_page, tmp_path):
    page = open_page()
    path = tmp_path / "report.html"
    found = path.read_text("utf-8").replace("<main", f"{SCRIPT}<img src=x onerror=alert(1)><main")
    path.write_text(found, "utf-8")
    said = []
    other = page.context.browser.new_page()
    other.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    other.goto(path.as_uri())
    other.wait_for_selector("html[data-ready]")
    other.close()
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_the_button_switches(open_page, scheme):
    page = open_page(color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    assert background(page) == COLORS[scheme]
    button = page.get_by_role("button", name=f"{other.title()} theme")
    button.focus()
    page.keyboard.press("Enter")
    assert background(page) == COLORS[other]
    page.reload()
    assert background(page) == COLORS[other]
    page.get_by_role("button", name=f"{scheme.title()} theme").click()
    assert background(page) == COLORS[scheme]


def test_text_of_a_figure_is_light_on_dark(open_page):
    page = open_page(color_scheme="dark")
    color = "getComputedStyle(document.querySelector('figure svg')).fill"
    assert page.evaluate(color) == "rgb(227, 232, 238)"
    page.emulate_media(media="print")
    assert page.evaluate(color) == "rgb(0, 0, 0)"


def test_nothing_overflows_on_a_phone(open_page):
    run = page_run(name="a name without spaces " + "x" * 200, git_commit="b" * 200)
    page = open_page(
        page_content([run, *many_runs()], missing=["y" * 200]),
        viewport={"width": 360, "height": 700},
    )
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_printed_page_has_whole_tables_and_no_controls(open_page):
    page = open_page(page_content(many_runs()), color_scheme="dark")
    box = page.locator("#all-runs").locator("xpath=ancestor::div[contains(@class, 'box')]")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("button:visible, input:visible, nav:visible").count()
    assert background(page) == COLORS["light"]
    assert box.evaluate("element => getComputedStyle(element).overflowY") == "visible"
    assert box.evaluate("element => getComputedStyle(element).maxHeight") == "none"


def test_without_scripts_tables_runs_and_titles_are_still_there(open_page):
    page = open_page(page_content(many_runs()), java_script_enabled=False, ready=False)
    assert page.locator("#all-runs tbody tr").count() == 8
    assert page.locator("#table-1").is_visible()
    assert not page.locator("button:visible, input:visible").count()
    assert page.locator("a.point title").count() == 16
    page.locator("details.run > summary").first.click()
    assert page.locator("details.run .curve").first.is_visible()


def test_each_part_has_a_name_for_screen_readers(open_page):
    page = open_page()
    assert page.get_by_role("table", name="All runs").count() == 1
    assert page.get_by_role("group", name="Accuracy").count() == 2
    assert page.get_by_role("region", name="Results").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"


def test_a_failed_run_is_linked_with_its_reason(open_page):
    failed = replace(page_run(2), row={**page_run(2).row, "error": "out of memory"})
    page = open_page(page_content([page_run(4), failed]))
    page.get_by_role("link", name="nano", exact=True).click()
    page.wait_for_selector("details.run[open]")
    assert page.locator("details.run[open] .body .error").inner_text() == "out of memory"
