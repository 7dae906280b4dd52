"""Command lines and Python examples of the README and the docs, run as they stand.

A block of commands is run unless the line before it is a comment `<!-- not run: needs … -->`.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)```", re.DOTALL)
# Blocks that `.ci/run` types: set-up, tests and checks.
TYPED_BY_CI = ("quickstart command", "test command", "checks")


def commands(page):
    """The command lines of a page, without those of marked blocks."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        mark = block["mark"] or ""
        if block["kind"] not in ("sh", "console") or mark.startswith(("not run: ", *TYPED_BY_CI)):
            continue
        for line in block["body"].replace("\\\n", " ").splitlines():
            if block["kind"] == "console" and not line.startswith("$ "):
                continue
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                yield words


PYTHON = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.fixture
def workplace(folder, tmp_path):
    """Photographs, the shipped studies, and the study of the README; studies train one epoch."""
    (tmp_path / "photos").mkdir()
    for split in ("train", "test"):
        (folder / split).rename(tmp_path / "photos" / split)
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    quickstart = tmp_path / "studies" / "quickstart.toml"
    text = quickstart.read_text()
    assert "epochs = 8\n" in text
    quickstart.write_text(text.replace("epochs = 8\n", "epochs = 1\nwarmup_epochs = 0\n"))
    (study,) = re.findall(r"```toml\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert "epochs = 10 " in study
    (tmp_path / "my-study.toml").write_text(study.replace("epochs = 10 ", "epochs = 1 "))
    return tmp_path


def test_every_page_with_commands_marks_those_that_are_not_run():
    every = {page.name: len(list(commands(page))) for page in PAGES}
    assert sum(every.values()) > 20
    assert every["README.md"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_runs(page, workplace, sret):
    for words in commands(page):
        assert words[0] == "sret", words
        code, _, err = sret(*words[1:])
        assert code == 0, (words, err)


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_every_python_example_prints_what_it_says(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"^ *print\(.*\)  # (\w+)", code, re.MULTILINE)
    assert expected == done.stdout.split()


def test_every_link_to_a_file_leads_to_one():
    for page in (*PAGES, ROOT / "studies" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), (page.name, target)
