"""Reads a study, a TOML file, into a list of runs.

`[model]` and `[train]` hold what all runs have in common. `[grid]` (all combinations), `[zip]`
(axes that change together) and `[[runs]]` (an explicit list) are multiplied to the points of the
study. A list `twins` adds controls of every run, and a list `baselines` adds untouched timm models.
No two points of a study may be the same run. `[report]` says what figures show.
"""

import json
import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import NoReturn

from sret_cli.cost.budget import TWIN_KINDS, twin_spec
from sret_cli.runtime.errors import USAGE, SretError, nearest_choice
from sret_cli.spec.run import HANDLING, Run, Table, put, twin_role
from sret_cli.study.paths import check_path, place_paths
from sret_cli.study.points import (
    named_list,
    places,
    points,
    shown,
    written,
)
from sret_cli.study.resolve import resolve_run
from sret_cli.study.view import ReportSpec

TABLES = ("model", "train", "grid", "zip", "runs", "twins", "baselines", "report")
LARGEST_FILE = 1_000_000  # bytes
MOST_RUNS = 10_000  # without --max-runs
RESERVED = ("train", "profile", "report")


@dataclass(frozen=True)
class Study:
    """A named list of runs and how to report them.

    Attributes:
        name: name of the study.
        runs: its runs, twins and baselines last.
        report: what its report shows.
        folder: folder of the study file, or None.
        question: the comment that heads the study file.
    """

    name: str
    runs: tuple[Run, ...]
    report: ReportSpec = field(default_factory=ReportSpec)
    folder: Path | None = None
    question: str = ""


def load_study(
    path: Path,
    train: Table | None = None,
    max_runs: int = MOST_RUNS,
    known_classes: int | None = None,
) -> Study:
    """Reads a study file; values in `train` take precedence over its `[train]`.

    Args:
        path: the file.
        train: values of `[train]` that flags gave.
        max_runs: how many points it may have.
        known_classes: the number of classes of the data, which then need not exist.

    Raises:
        SretError: the file cannot be read, is not a study, has an invalid run, or more than
            `max_runs` points.
    """
    tables = read_study(path)
    if (count := count_points(tables)) > max_runs:
        raise SretError(f"{path} has {count:,} runs; if you want them, give --max-runs {count}")
    if path.stem in RESERVED:
        raise SretError(
            f"{path}: runs/{path.stem} is used by sret itself; give the study another name"
        )
    try:
        study = study_from_tables(path.stem, tables, path.parent, train or {}, known_classes)
        return replace(study, question=study_question(path))
    except SretError as error:
        raise SretError(f"{path}: {error}", error.code) from None


def count_points(tables: Table) -> int:
    """How many points the tables of a study have, without making them; twins do not count."""
    grid, together, listed = (tables.get(name, {}) for name in ("grid", "zip", "runs"))
    lengths = [len(v) for v in grid.values() if isinstance(v, list)] if type(grid) is dict else []
    rows = [len(v) for v in together.values() if isinstance(v, list)] if together else []
    runs = len(listed) if isinstance(listed, list) else 1
    return prod(lengths) * max(rows, default=1) * runs


def load_report(path: Path) -> ReportSpec:
    """The `[report]` of a study file; its data need not exist."""
    tables = read_study(path)
    try:
        return ReportSpec.of(tables.get("report", {}))
    except SretError as error:
        raise SretError(f"{path}: {error}", error.code) from None


def study_question(path: Path) -> str:
    """The comment that heads a study file: its question, without the marks of a comment."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines).strip()


def read_study(path: Path) -> Table:
    """The tables of a study file, unchecked.

    Raises:
        SretError: the file cannot be read or is not TOML.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise SretError(f"{path} is not a study, which is a TOML file: {reason}") from None


def read_text(path: Path) -> str:
    """The text of a study file.

    Raises:
        SretError: the file cannot be read, is not text, or is larger than 1 MB.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise SretError(f"{path} is larger than 1 MB, which no study is")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SretError(f"no study file {path}; see studies/ for examples") from None
    except OSError as error:
        raise SretError(f"cannot read the study {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        reason = "it is not text"
        raise SretError(f"{path} is not a study, which is a TOML file: {reason}") from None


def study_from_tables(
    name: str,
    tables: Table,
    folder: Path | None = None,
    flags: Table | None = None,
    known_classes: int | None = None,
) -> Study:
    """A study from the tables of its file.

    Args:
        name: name of the study.
        tables: contents of the file.
        folder: folder of the file, if there is one.
        flags: values that take precedence over `[train]`.
        known_classes: the number of classes of the data, which then need not exist.
    """
    flags = flags or {}
    for key, value in tables.items():
        if key not in TABLES:
            raise SretError(f"unknown table [{key}]; {nearest_choice(key, list(TABLES))}")
        if key == "twins":
            for kind in named_list(key, value, ", ".join(TWIN_KINDS)):
                if kind not in TWIN_KINDS:
                    raise SretError(
                        f"twins: unknown kind {kind!r}; {nearest_choice(kind, [*TWIN_KINDS])}"
                    )
        elif key == "baselines":
            named_list(key, value, "names of timm models")
        elif not isinstance(value, list if key == "runs" else dict):
            raise SretError(f"{key} = {value!r}: write {key} as {written(key)}")
        if key == "runs" and not value:
            raise SretError("runs is an empty list; write each run as [[runs]], or leave it out")
    if not any(key in tables for key in TABLES if key != "report"):
        raise SretError(f"a study needs at least one of the tables {', '.join(TABLES[:-1])}")
    for key, place in places(tables).items():
        if key.removeprefix("train.") in flags and key.startswith("train."):
            raise SretError(f"{written(place)} has values of {key}; leave out the flag", USAGE)
    distinct: dict[str, Run] = {}
    baselines = []
    texts: dict[str, str] = {}
    for point in points(tables):
        text = shown(point)
        model, train = dict(tables.get("model", {})), dict(tables.get("train", {}))
        label = point.pop("name", None)
        for key, value in point.items():
            table, _, name_in_table = key.partition(".")
            put(model if table == "model" else train, name_in_table, value)
        trains = bool(train or flags) or "train" in tables
        if folder is not None:
            train = place_paths(train, folder)
            if "data_dir" not in flags and known_classes is None:
                check_path("data_dir", train.get("data_dir"), folder)
        train |= flags
        if "model" in tables or "runs" in tables or model or "baselines" not in tables:
            run = resolve_run(name, model, train if trains else None, label, known_classes)
            known = _canonical(run)
            if known in distinct:
                _refuse_same(distinct[known], run, texts[known], text)
            distinct[known], texts[known] = run, text
        images = {k: model[k] for k in ("img_size", "in_chans", "num_classes") if k in model}
        for backbone in tables.get("baselines", ()):
            baseline = {**images, "backbone": backbone}
            baseline_run = resolve_run(
                name, baseline, train if trains else None, None, known_classes
            )
            baselines.append(baseline_run)
    runs = with_twins(list(distinct.values()), tables.get("twins", []))
    distinct = {_canonical(run): run for run in [*runs, *baselines]}
    report = ReportSpec.of(tables.get("report", {}))
    return Study(name, tuple(distinct.values()), report, folder)


def _canonical(run: Run) -> str:
    """What a run does, as text that is equal for equal runs."""
    spec = run.spec()
    if spec["train"] is not None:
        spec["train"] |= HANDLING
    return json.dumps(spec, sort_keys=True)


def with_baselines(study: Study, backbones: list[str]) -> Study:
    """The study with timm models added after its runs, for the images of its first model."""
    first = study.runs[0].model
    images = {key: getattr(first, key) for key in ("img_size", "in_chans", "num_classes")}
    baselines = [resolve_run(study.name, {**images, "backbone": name}, None) for name in backbones]
    return replace(study, runs=(*study.runs, *baselines))


def _refuse_same(first: Run, second: Run, first_point: str, second_point: str) -> NoReturn:
    if first.name != second.name:
        first_point, second_point = repr(first.name), repr(second.name)
    raise SretError(f"{first_point} and {second_point} are the same run; leave one out")


def with_twins(runs: list[Run], kinds: list[str]) -> list[Run]:
    """The runs, followed by their twins of some kinds; a twin that is already a run is not added.

    A twin of several runs is one run, and knows all of them. timm models have no twins.
    """
    control, known = cache(twin_spec), {_canonical(run) for run in runs}
    twins: dict[str, Run] = {}
    for run, kind in product(runs, kinds):
        if run.model.is_timm:
            continue
        try:
            model = control(run.model, kind)
        except SretError as error:
            raise SretError(f"twins: {kind!r} of {run.name!r}: {error}", error.code) from None
        role = twin_role(kind)
        twin = replace(run, name=f"{run.name} {role}", model=model, role=role)
        key = _canonical(twin)
        if key not in known:
            twin = twins.get(key, twin)
            twins[key] = replace(twin, twin_of=(*twin.twin_of, run))
    return [*runs, *twins.values()]
