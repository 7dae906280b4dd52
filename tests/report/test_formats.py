"""Tables as Markdown, LaTeX, HTML, JSON and CSV, with hostile names in them."""

import csv
import io
import json
import shutil
import subprocess

import pytest
from helpers import study_rows

from sret_cli.report import formats
from sret_cli.report.comparisons import compare, comparison_table
from sret_cli.report.summary import summarise
from sret_cli.report.table import text_table

GRID = {"model.recursions": [1, 8], "train.seed": [0, 1]}
HOSTILE = (
    "=cmd|' /C calc'!A0",
    "a_b & 50 % of $x$ #1 {y} ~ ^ \\input{secret}",
    "<script>alert(1)</script>",
    "two\nlines\tand\x1b[31m red",
    "schön, 深い, \N{GRINNING FACE}",
    "| a `code` *star* [link](x)",
)


def table():
    return summarise(study_rows((90.0, 92.0, 94.0, 94.0), grid=GRID), title="depth")


def test_markdown_is_a_table_with_its_notes_under_it():
    assert formats.markdown(table()).splitlines() == [
        "| Layers | Seeds | FLOPs (G) | Top-1 (%) |",
        "| ---: | ---: | ---: | ---: |",
        "| 4 | 2 | 0.00400 | 91.00 ± 12.71 |",
        "| 32 | 2 | 0.0320 | 94.00 ± 0.00 |",
        "",
        "Model: nano; Params (M): 0.33",
        "",
        "±: 95 % confidence interval of the mean over seeds (Student's t), 2 seeds (0, 1)",
        "",
        "FLOPs: one multiply-add counts as one.",
    ]


def test_latex_has_rules_of_booktabs_and_columns_of_siunitx():
    lines = formats.latex(table(), "tab:depth").splitlines()
    assert lines[0] == r"% needs \usepackage{booktabs} and \usepackage{siunitx}"
    assert lines[8] == (
        r"\begin{tabular}{S[table-format=2.0]S[table-format=1.0]"
        r"S[table-format=1.5, group-digits=integer]"
        r"S[table-format=2.2(4), separate-uncertainty=true, table-align-uncertainty=false]}"
    )
    assert lines[9:13] == [
        r"\toprule",
        r"{Layers} & {Seeds} & {FLOPs (G)} & {Top-1 (\%)} \\",
        r"\midrule",
        r"4 & 2 & 0.00400 & 91.00 \pm 12.71 \\",
    ]


def test_json_has_values_in_their_own_unit_with_the_ends_of_intervals():
    first, second = json.loads(formats.json_text(table()))
    assert (first["layers"], first["seeds"], first["macs"]) == (4, 2, 4_000_000)
    assert first["top1_percent"] == 91.0
    assert first["top1_percent_low"] == pytest.approx(91 - 12.706204736174694)
    assert (second["top1_percent_low"], second["top1_percent_n"]) == (94.0, 2)


def test_csv_keeps_every_row_and_every_digit():
    rows = study_rows((0.1234567890123456, 92.0, 94.0, 94.0), grid=GRID)
    read = list(csv.DictReader(io.StringIO(formats.csv_text(rows))))
    assert len(read) == 4
    assert read[0]["top1_percent"] == "0.1234567890123456"
    assert read[0]["model.embed_dims"] == "[32, 64, 128]"
    assert read[0]["peak_memory_bytes"] == ""
    assert (read[0]["role"], read[0]["twin_of"]) == ("shared", "")


def test_what_a_spreadsheet_would_run_is_text():
    rows = [{"name": name, "top1_percent": -1.5} for name in ("=1+1", "@x", "+1", "-1", "plain")]
    read = list(csv.DictReader(io.StringIO(formats.csv_text(rows))))
    assert [row["name"] for row in read] == ["'=1+1", "'@x", "'+1", "'-1", "plain"]
    assert {row["top1_percent"] for row in read} == {"-1.5"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    made = text_table(["Model", name], [[name, "1"]])
    markdown = formats.markdown(made)
    assert len(markdown.splitlines()) == 3
    assert markdown.splitlines()[2].replace(r"\|", "").count("|") == 3
    for text in (markdown, formats.html(made), formats.latex(made)):
        assert "<script>" not in text
        assert "\x1b" not in text
    assert r"\input" not in formats.latex(made)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex with siunitx")
def test_latex_compiles_with_hostile_names_and_bold_differences(tmp_path):
    rows = study_rows(
        (91.0, 92.0, 80.0, 81.0, 60.5, 61.0, 50.0, 51.0),
        twins=["layers"],
        grid={"model.recursions": [2, 8], "train.seed": [0, 1]},
    )
    comparisons = comparison_table(compare(rows))
    assert any(cell.bold for line in comparisons.lines for cell in line)
    hostile = text_table(["Model", "n"], [[name, "1"] for name in HOSTILE])
    tables = (summarise(rows), summarise(rows[:1]), comparisons, hostile)
    body = "\n".join(formats.latex(made) for made in tables)
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage[T1]{fontenc}\n"
        "\\usepackage{booktabs}\\usepackage{siunitx}\n"
        f"\\begin{{document}}\n{body}\n\\end{{document}}\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2_000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")
