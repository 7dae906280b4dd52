"""Flags to specs: the study, the options and the settings that a command was given."""

import tomllib
from pathlib import Path
from typing import Any

import typer

from sret_cli.commands.flags import MODEL_FLAGS, TRAIN_FLAGS, TRAINING
from sret_cli.commands.output import stderr_console
from sret_cli.runtime.errors import USAGE, SretError
from sret_cli.spec.run import Table, put
from sret_cli.study.file import Study, load_study
from sret_cli.study.points import check_key
from sret_cli.study.resolve import resolve_run


def flags_given(context: typer.Context) -> dict[str, Any]:
    """The arguments and flags of a command that are not left at nothing."""
    return {k: v for k, v in context.params.items() if v is not None and v not in ([], ())}


def study_from(context: typer.Context, trains: bool) -> Any:
    """The study that a command's argument and flags describe; says where slices were fitted."""
    given = flags_given(context)
    model = {key: given[key] for key in MODEL_FLAGS if key in given}
    if model.get("share", "").isdecimal():
        model["share"] = int(model["share"])
    train = {key: given[key] for key in (TRAIN_FLAGS if trains else ("data_dir",)) if key in given}
    if given.get("synthetic"):
        if "dataset" in train or "data_dir" in train:
            raise SretError(
                "--synthetic needs no other data; leave the one or the other out", USAGE
            )
        train["dataset"] = "synthetic"
    if trains and "compile_" in given:
        train["compile"] = given["compile_"]
    if trains and "recompute" in given:
        train["recompute"] = recompute_of(given["recompute"])
    settings, path = list(given.get("set_", ())), given.get("study")
    if "data_dir" in train and not trains and path is None:
        raise SretError("--data-dir goes with a study here, whose classes it counts", USAGE)
    study = study_from_flags(path, model, train if trains or path else None, settings)
    if path is None:
        spec = study.runs[0].model
        for field in ("recursive_slices", "slices"):
            if field in given:
                note_fitted_slices(spec, field, given[field])
    return study


def note_fitted_slices(spec: Any, field: str, wanted: int) -> None:
    """Says which stages take other slices than were asked for."""
    for stage, (slices, tokens) in enumerate(zip(getattr(spec, field), spec.tokens, strict=True)):
        if slices != wanted:
            many = "1 slice" if slices == 1 else f"{slices} slices"
            stderr_console().print(
                f"stage {stage + 1}: its {tokens} tokens take {many}, not {wanted}"
            )


def recompute_of(text: str | None) -> Any:
    """The value of --recompute, checked; None where it is not given."""
    from sret_cli.spec.train import TrainSpec

    if text is None:
        return None
    value: Any = int(text) if text.isdecimal() else text
    return TrainSpec(recompute=value).recompute


def gpu_memory_of(text: str | None) -> int | None:
    """The bytes of --gpu-memory."""
    from sret_cli.spec.quantity import parse_quantity

    return None if text is None else parse_quantity(text)


def training_options(context: typer.Context) -> Any:
    """How and where to train, by a command's flags; a device that is not there is refused."""
    from sret_cli.spec.options import RunOptions

    check_device(context.params["device"])
    given = {name: context.params[name] for name in TRAINING}
    return RunOptions(**{**given, "gpu_memory": gpu_memory_of(given["gpu_memory"])})


def check_device(name: str | None) -> None:
    """Refuses a device that is not there before anything is done."""
    if name not in (None, "auto", "cpu"):
        from sret_cli.runtime.device import choose_device

        choose_device(str(name))


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Table, key and value of a `--set model.mlp_ratio=4`.

    Raises:
        SretError: the text has another form, or names no field.
    """
    key, equals, value = text.partition("=")
    table, _, name = key.strip().partition(".")
    if not equals or table not in ("model", "train") or not name:
        raise SretError(f"--set {text}: write it as model.FIELD=VALUE or train.FIELD=VALUE")
    check_key("--set", key.strip())
    try:
        return table, name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return table, name, value.strip()


def model_settings(settings: list[str], given: Table | None = None) -> Table:
    """Given fields of a model, and those that texts such as "model.mlp_ratio=4" set.

    Raises:
        SretError: a text has another form, or names no field of the model.
    """
    tables: dict[str, Table] = {"model": dict(given or {})}
    apply_settings(tables, settings, trains=False)
    return tables["model"]


def apply_settings(tables: dict[str, Table], settings: list[str], trains: bool) -> None:
    """Adds the values of texts such as "train.lr=1e-3" to tables of flags.

    Raises:
        SretError: a text has another form, names no field, or one that has a value already.
    """
    for table, key, value in map(parse_setting, settings):
        if table == "train" and not trains:
            raise SretError(f"--set train.{key}: nothing is trained here; use it with `sret train`")
        outer, _, inner = key.partition(".")
        known = tables[table].get(outer, {}) if inner else tables[table]
        if isinstance(known, dict) and (inner or outer) in known:
            raise SretError(
                f"--set {table}.{key}={value} is the second value of {table}.{key}, after "
                f"{known[inner or outer]!r}; leave one of the two out",
                USAGE,
            )
        put(tables[table], key, value)


def study_from_flags(
    path: Path | None, model: Table, train: Table | None, settings: list[str]
) -> Study:
    """The study of a file, or the one run that flags describe.

    Next to a file only `data_dir` may be given, since where data lie is no part of the question,
    and fields of `[train]` by settings, which stand before those of the file.

    Args:
        path: a study file, or None.
        model: values of `[model]`, without those that were not given.
        train: likewise of `[train]`; None where nothing is to be trained.
        settings: texts such as "model.mlp_ratio=4".
    """
    tables = {"model": dict(model), "train": dict(train or {})}
    apply_settings(tables, settings, trains=train is not None)
    if path is None:
        name = "profile" if train is None else "train"
        run = resolve_run(name, tables["model"], None if train is None else tables["train"])
        return Study(name, (run,))
    others = [*tables["model"], *(key for key in train or {} if key != "data_dir")]
    if others:
        raise SretError(
            f"{path} says what to run; leave out {', '.join(others)}, or copy the file and edit it",
            USAGE,
        )
    return load_study(path, tables["train"])
