"""All mistakes of a study file at once, each with its line."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sret_cli.runtime.errors import DATA, SretError, nearest_choice
from sret_cli.spec.run import Table, put
from sret_cli.spec.train import TrainSpec
from sret_cli.study.file import TABLES, read_text, study_from_tables
from sret_cli.study.paths import place_paths
from sret_cli.study.points import check_key, points
from sret_cli.study.resolve import BACKBONE_KEYS, MODEL_KEYS, resolve_run
from sret_cli.study.view import ReportSpec

MOST_PROBLEMS = 20  # that are told
HEADER = re.compile(r"\s*\[\[?\s*([\w.]+)\s*\]?\]")
KEY = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([\w.-]+))\s*=""")


@dataclass(frozen=True)
class Problem:
    """A mistake in a study file; the line is None where it belongs to no line."""

    line: int | None
    message: str


def find_problems(path: Path) -> tuple[list[Problem], int]:
    """The mistakes of a study file, at most 20, and the number of its runs if there are none.

    Raises:
        SretError: the file cannot be read.
    """
    text = read_text(path)
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        found = re.search(r"at line (\d+)", str(error))
        return [Problem(int(found[1]) if found else None, f"not TOML: {error}")], 0
    lines = _Lines(text)
    problems = _key_problems(tables, lines)
    try:
        ReportSpec.of(tables.get("report", {}))
    except SretError as error:
        problems.append(lines.problem(str(error), "report"))
    problems += _point_problems(_known_keys(tables), lines, path)
    if problems:
        return sorted(problems, key=lambda p: p.line or 0)[:MOST_PROBLEMS], 0
    try:
        return [], len(study_from_tables(path.stem, tables, path.parent).runs)
    except SretError as error:
        if _is_about_data(error):
            return [], len(list(points(tables)))
        return [lines.problem(str(error))], 0


def _is_about_data(error: SretError) -> bool:
    """Whether an error says that data are missing, which a flag of the command may give."""
    return error.code == DATA or "--data-dir" in str(error)


def _known_keys(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables without unknown tables and keys, so that the values of the others are checked."""
    known = {"model": {*MODEL_KEYS, *BACKBONE_KEYS}, "train": {*TrainSpec.model_fields}}
    kept: dict[str, Any] = {}
    for name, table in tables.items():
        if name in known and isinstance(table, dict):
            kept[name] = {key: value for key, value in table.items() if key in known[name]}
        elif name in ("grid", "zip") and isinstance(table, dict):
            kept[name] = {key: value for key, value in table.items() if _is_axis(key)}
        elif name in TABLES:
            kept[name] = table
    return kept


def _is_axis(key: str) -> bool:
    try:
        check_key("", key)
    except SretError:
        return False
    return True


def _key_problems(tables: dict[str, Any], lines: "_Lines") -> list[Problem]:
    problems = []
    for name in tables:
        if name not in TABLES:
            message = f"unknown table [{name}]; {nearest_choice(name, list(TABLES))}"
            problems.append(Problem(lines.line(name), message))
    known = {
        "model": list(dict.fromkeys((*MODEL_KEYS, *BACKBONE_KEYS))),
        "train": list(TrainSpec.model_fields),
    }
    for name, keys in known.items():
        table = tables.get(name, {})
        for key in table if isinstance(table, dict) else ():
            if key not in keys:
                message = f"[{name}] unknown key {key!r}; {nearest_choice(key, keys)}"
                problems.append(Problem(lines.line(name, key), message))
    for name in ("grid", "zip", "runs"):
        entries = tables.get(name, {})
        for entry in entries if isinstance(entries, list) else [entries]:
            for key in entry if isinstance(entry, dict) else ():
                if name == "runs" and key == "name":
                    continue
                try:
                    check_key(f"[{name}]", key)
                except SretError as error:
                    problems.append(Problem(lines.line(name, key), str(error)))
    return list(dict.fromkeys(problems))


def _point_problems(tables: Table, lines: "_Lines", path: Path) -> list[Problem]:
    """The mistakes in the values of a study's points."""
    problems: dict[str, Problem] = {}
    try:
        for point in points(tables):
            model, train = dict(tables.get("model", {})), dict(tables.get("train", {}))
            label = point.pop("name", None)
            for key, value in point.items():
                table, _, field = key.partition(".")
                put(model if table == "model" else train, field, value)
            trains = bool(train) or "train" in tables
            try:
                resolve_run(
                    path.stem,
                    model,
                    place_paths(train, path.parent) if trains else None,
                    label,
                )
            except SretError as error:
                if not _is_about_data(error):
                    problems.setdefault(str(error), lines.problem(str(error)))
            if len(problems) >= MOST_PROBLEMS:
                break
    except SretError as error:
        problems.setdefault(str(error), lines.problem(str(error)))
    return list(problems.values())


class _Lines:
    """Where tables and keys stand in a file."""

    def __init__(self, text: str) -> None:
        self.text = text.splitlines()
        self.places: dict[tuple[str, str], int] = {}
        table = ""
        for number, line in enumerate(text.splitlines(), 1):
            if header := HEADER.match(line):
                table = header[1]
                self.places.setdefault((table, ""), number)
            elif key := KEY.match(line):
                name = key[1] or key[2] or key[3]
                self.places.setdefault((table, name), number)

    def line(self, table: str, key: str = "") -> int | None:
        """The line of a table's header or of a key in it."""
        return self.places.get((table, key)) or self.places.get(("", table))

    def problem(self, message: str, table: str = "") -> Problem:
        """A mistake at the line of the key that its message names first."""
        named: list[tuple[int, int]] = []
        for (place, key), line in self.places.items():
            field = key.rpartition(".")[2]
            if field and (not table or place.startswith(table)):
                if found := re.search(rf"(?<![\w.]){re.escape(field)}(?!\w)", message):
                    named.append((found.start(), line))
        if named:
            return Problem(min(named)[1], message)
        for value in re.findall(r"'([^']+)'", message):  # the value of a list
            for number, words in enumerate(self.text, 1):
                if value in words and not words.lstrip().startswith("#"):
                    return Problem(number, message)
        return Problem(self.line(table) if table else None, message)
