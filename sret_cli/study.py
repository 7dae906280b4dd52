"""Studies: a TOML file, or flags, to a list of runs.

A study file has tables `[model]` and `[train]`, whose product with `[grid]` (all combinations),
`[zip]` (axes that move together) and `[[runs]]` (an explicit list) is the list of runs, and
`[report]`. A list `twins` above the tables adds the controls of every run, of the kinds it names;
a list `baselines` adds untouched models of timm's.
"""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from sret_cli.backbone import BackboneSpec
from sret_cli.cost import TWIN_KINDS, twin
from sret_cli.errors import USAGE, SretError, nearest
from sret_cli.recipe import TrainSpec
from sret_cli.records import HANDLING, MEASUREMENTS
from sret_cli.run import BACKBONE_KEYS, MODEL_KEYS, Run, Table, put, resolve
from sret_cli.spec import ModelSpec
from sret_cli.strict import Strict

TABLES = ("model", "train", "grid", "zip", "runs", "twins", "baselines", "report")
RESERVED = ("train", "profile", "report")


NUMBERS = [
    f"{table}.{name}"
    for table, cls in (("model", ModelSpec), ("train", TrainSpec))
    for name, field_info in cls.model_fields.items()
    if field_info.annotation in (int, float)
]


class ReportSpec(Strict):
    """What a study's figures show: columns of its rows."""

    x: str = "layers"
    y: tuple[str, ...] = ("top1_percent", "macs")

    @classmethod
    def of(cls, table: Table) -> "ReportSpec":
        """The `[report]` table of a study, with columns that exist."""
        table = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        spec = cls(**table)
        fields = [f"model.{f}" for f in dict.fromkeys((*ModelSpec.model_fields, *BACKBONE_KEYS))]
        fields += [f"train.{f}" for f in TrainSpec.model_fields]
        for column in (spec.x, *spec.y):
            if is_timm_argument(column):
                continue
            if column not in (*MEASUREMENTS, *fields):
                hint = nearest(column, [*MEASUREMENTS, *fields])
                raise SretError(f"[report] unknown column {column!r}; {hint}")
            if column not in (*NUMBERS, *MEASUREMENTS):
                raise SretError(
                    f"[report] {column} is not one number a run, and cannot be an axis; use "
                    "layers, or another measurement"
                )
        return spec


@dataclass(frozen=True)
class Study:
    """A named list of runs and how to report them."""

    name: str
    runs: tuple[Run, ...]
    report: ReportSpec = field(default_factory=ReportSpec)


def load_study(path: Path, train: Table | None = None) -> Study:
    """Reads a study file; values in `train` stand before those of its `[train]`.

    Raises:
        SretError: the file cannot be read, is not a study, or asks for what can't be.
    """
    tables = read_study(path)
    if path.stem in RESERVED:
        raise SretError(f"{path}: runs/{path.stem} has another use; give the study another name")
    if train:
        tables["train"] = {**tables.get("train", {}), **train}
    try:
        return study_of(path.stem, tables)
    except SretError as error:
        raise SretError(f"{path}: {error}", error.code) from None


def load_report(path: Path) -> ReportSpec:
    """The `[report]` of a study file, whose data need not be there."""
    tables = read_study(path)
    try:
        return ReportSpec.of(tables.get("report", {}))
    except SretError as error:
        raise SretError(f"{path}: {error}", error.code) from None


def read_study(path: Path) -> Table:
    """The tables of a study file, as they stand in it.

    Raises:
        SretError: the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SretError(f"no study file {path}; see studies/ for examples") from None
    except OSError as error:
        raise SretError(f"cannot read the study {path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = "not text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise SretError(f"{path} is not a study, which is a TOML file: {reason}") from None


def study_of(name: str, tables: Table) -> Study:
    """A study of the tables of its file."""
    for key, value in tables.items():
        if key not in TABLES:
            raise SretError(f"unknown table [{key}]; {nearest(key, list(TABLES))}")
        if key == "twins":
            _check_twins(value)
        elif key == "baselines":
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise SretError(f"baselines = {value!r}: give a list of timm's names of models")
        elif not isinstance(value, list if key == "runs" else dict):
            written = f"[[{key}]]" if key == "runs" else f"[{key}]"
            raise SretError(f"{key} = {value!r}: write {key} as {written}")
        if key == "runs" and not value:
            raise SretError("runs is an empty list; write each run as [[runs]], or leave it out")
    if not any(key in tables for key in TABLES if key != "report"):
        raise SretError(f"a study has at least one of the tables {', '.join(TABLES[:-1])}")
    runs, baselines = [], []
    for point in _points(tables):
        model, train = dict(tables.get("model", {})), dict(tables.get("train", {}))
        label = point.pop("name", None)
        for key, value in point.items():
            table, _, name_in_table = key.partition(".")
            put(model if table == "model" else train, name_in_table, value)
        trains = "train" in tables or any(key.startswith("train.") for key in point)
        if "model" in tables or "runs" in tables or model or "baselines" not in tables:
            runs.append(resolve(name, model, train if trains else None, label))
        images = {k: model[k] for k in ("img_size", "in_chans", "num_classes") if k in model}
        for backbone in tables.get("baselines", ()):
            baseline = {**images, "backbone": backbone}
            baselines.append(resolve(name, baseline, train if trains else None))
    distinct: dict[str, Run] = {}
    for run in runs:
        same = distinct.setdefault(_canonical(run), run)
        if same.name != run.name:
            raise SretError(f"{same.name!r} and {run.name!r} are the same run; leave one out")
    runs = with_twins(list(distinct.values()), tables.get("twins", []))
    distinct = {_canonical(run): run for run in [*runs, *baselines]}
    return Study(name, tuple(distinct.values()), ReportSpec.of(tables.get("report", {})))


def _canonical(run: Run) -> str:
    """What a run does, as text, with the places of its data for what lies there."""
    spec = run.spec()
    if spec["train"] is not None:
        spec["train"] |= HANDLING
    return json.dumps(spec, sort_keys=True)


def with_baselines(study: Study, backbones: list[str]) -> Study:
    """The study, and after its runs models of timm's for the images of its first model."""
    first = study.runs[0].model
    images = {key: getattr(first, key) for key in ("img_size", "in_chans", "num_classes")}
    baselines = [resolve(study.name, {**images, "backbone": name}, None) for name in backbones]
    return replace(study, runs=(*study.runs, *baselines))


def _check_twins(kinds: Any) -> None:
    if not isinstance(kinds, list):
        raise SretError(f"twins = {kinds!r}: give a list of {', '.join(TWIN_KINDS)}")
    for kind in kinds:
        if kind not in TWIN_KINDS:
            raise SretError(f"twins: unknown kind {kind!r}; {nearest(str(kind), list(TWIN_KINDS))}")


def with_twins(runs: list[Run], kinds: list[str]) -> list[Run]:
    """The runs, and after them their twins of some kinds; what is there already is not added.

    Models of timm's have none.
    """
    found, control, added = {_canonical(run) for run in runs}, cache(twin), []
    for run, kind in product(runs, kinds):
        if isinstance(run.model, BackboneSpec):
            continue
        try:
            model = control(run.model, kind)
        except SretError as error:
            raise SretError(f"twins: {kind!r} of {run.name!r}: {error}", error.code) from None
        made = replace(run, name=f"{run.name} twin {kind}", model=model)
        if _canonical(made) not in found:
            found.add(_canonical(made))
            added.append(made)
    return [*runs, *added]


def _points(tables: Table) -> Iterator[Table]:
    """Every point of the study: values of the grid's product, the zip's row, and the listed run."""
    grid, together = tables.get("grid", {}), tables.get("zip", {})
    for name, axes in (("grid", grid), ("zip", together)):
        for key, values in axes.items():
            _check_key(f"[{name}]", key)
            if not isinstance(values, list) or not values:
                raise SretError(f"[{name}] {key!r} = {values!r}: give a list of values")
    lengths = {key: len(values) for key, values in together.items()}
    if len(set(lengths.values())) > 1:
        raise SretError(f"[zip] axes move together and must be as long as each other: {lengths}")
    listed = tables.get("runs", [{}])
    for number, entry in enumerate(listed):
        if not isinstance(entry, dict):
            raise SretError(f"runs = {listed!r}: write each run as a table, [[runs]]")
        for key in entry:
            if key != "name":
                _check_key(f"[[runs]] {number + 1}:", key)
            elif not isinstance(entry[key], str):
                raise SretError(f"[[runs]] {number + 1}: name = {entry[key]!r}: give a text")
    rows = [
        dict(zip(together, values, strict=True)) for values in zip(*together.values(), strict=True)
    ]
    rows = rows or [{}]
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    for entry, row, combination in product(listed, rows, combinations):
        yield {**row, **combination, **entry}


def is_timm_argument(key: str) -> bool:
    """Whether a key is `model.timm_args.NAME`; timm's model says whether it takes the argument."""
    start, _, name = key.rpartition(".")
    return start == "model.timm_args" and name.isidentifier()


def _check_key(place: str, key: str) -> None:
    keys = [f"model.{k}" for k in dict.fromkeys((*MODEL_KEYS, *BACKBONE_KEYS))]
    keys += [f"train.{k}" for k in TrainSpec.model_fields]
    if key not in keys and not is_timm_argument(key):
        hint = f'; write it in quotes, "{key}.…"' if key in ("model", "train") else ""
        raise SretError(f"{place} unknown key {key!r}{hint}; {nearest(key, keys)}")


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Table, key and value of a `--set model.mlp_ratio=4`.

    Raises:
        SretError: the text has another form, or names no field.
    """
    key, equals, value = text.partition("=")
    table, _, name = key.strip().partition(".")
    if not equals or table not in ("model", "train") or not name:
        raise SretError(f"--set {text}: write it as model.FIELD=VALUE or train.FIELD=VALUE")
    _check_key("--set", key.strip())
    try:
        return table, name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return table, name, value.strip()


def model_settings(settings: list[str]) -> Table:
    """The fields of a model that texts such as "model.mlp_ratio=4" set, where nothing is trained.

    Raises:
        SretError: a text has another form, or names no field of the model.
    """
    values: Table = {}
    for table, key, value in map(parse_setting, settings):
        if table == "train":
            raise SretError(f"--set train.{key}: nothing is trained here; use it with `sret train`")
        put(values, key, value)
    return values


def from_flags(path: Path | None, model: Table, train: Table | None, settings: list[str]) -> Study:
    """The study of a file, or the one run that flags describe.

    Beside a file only `data_dir` may be given, since where data lie is no part of the question.

    Args:
        path: a study file, or None.
        model: values of `[model]`, without those that were not given.
        train: likewise of `[train]`; None where nothing is to be trained.
        settings: texts such as "model.mlp_ratio=4".
    """
    tables = {"model": dict(model), "train": dict(train or {})}
    for table, key, value in map(parse_setting, settings):
        if table == "train" and train is None:
            raise SretError(f"--set train.{key}: nothing is trained here; use it with `sret train`")
        put(tables[table], key, value)
    if path is None:
        name = "profile" if train is None else "train"
        run = resolve(name, tables["model"], None if train is None else tables["train"])
        return Study(name, (run,))
    others = [*tables["model"], *(key for key in tables["train"] if key != "data_dir")]
    if others:
        raise SretError(
            f"{path} says what to run; leave out {', '.join(others)}, or copy the file and edit it",
            USAGE,
        )
    return load_study(path, tables["train"])
