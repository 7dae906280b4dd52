"""From a command's flags to specs: the study, the options and the settings that were given."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sret_cli.commands.config import user_defaults
from sret_cli.commands.flags import MODEL_FLAGS, TRAIN_FLAGS
from sret_cli.commands.output import stderr_console
from sret_cli.runtime.errors import USAGE, SretError, nearest_choice
from sret_cli.runtime.files import utc_now

# Specs and studies need pydantic, which `sret --help` does without.
if TYPE_CHECKING:
    from sret_cli.spec.options import RunOptions
    from sret_cli.study.engines import EngineOptions
    from sret_cli.study.file import Study

Table = dict[str, Any]


# The flags of engines, for commands that have only some of them.
ENGINE_FLAGS = {
    "engine": "local",
    "address": None,
    "slurm": None,
    "wait": False,
    "gpus_per_run": 1,
    "runs_per_gpu": 1,
    "retries": 2,
}


def flags_given(context: typer.Context) -> dict[str, Any]:
    """A command's arguments and flags by parameter name, without those that were not given.

    This is how a command reads the flags that it lists but does not use one by one. A flag with a
    default is always in it, and so is a switch that is off.
    """
    return {k: v for k, v in context.params.items() if v is not None and v not in ([], ())}


def model_flags_given(context: typer.Context) -> list[str]:
    """Names of the flags that describe a model, `--set` among them, as far as they were given."""
    given = flags_given(context)
    return [name for name in (*MODEL_FLAGS, "set_") if name in given]


def study_from(context: typer.Context, trains: bool) -> "Study":
    """The study that a command's argument and flags describe.

    Prints a note for each stage that takes another number of slices than was asked for.

    Args:
        context: the command's.
        trains: whether the command trains, and so takes the flags of `[train]`.
    """
    given = flags_given(context)
    path, settings = given.get("study"), list(given.get("set_", ()))
    train = train_table(given) if trains else data_table(given)
    if "data_dir" in train and not trains and path is None:
        raise SretError(
            "--data-dir only serves to count the classes of a study here; name a study, or use "
            "--num-classes",
            USAGE,
        )
    table = train if trains or path else None
    most = given.get("max_runs")
    study = study_from_flags(path, model_table(given), table, settings, most)
    if path is None:
        spec = study.runs[0].model
        for field in ("recursive_slices", "slices"):
            if field in given:
                note_fitted_slices(spec, field, given[field])
    return study


def model_table(given: dict[str, Any]) -> Table:
    """The values of `[model]` among the flags that were given."""
    model = {key: given[key] for key in MODEL_FLAGS if key in given}
    if model.get("share", "").isdecimal():
        model["share"] = int(model["share"])
    return model


def data_table(given: dict[str, Any]) -> Table:
    """The values of `[train]` that say where the images are."""
    return {"data_dir": given["data_dir"]} if "data_dir" in given else {}


def train_table(given: dict[str, Any]) -> Table:
    """The values of `[train]` among the flags that were given.

    Raises:
        SretError: `--synthetic` was given together with other data, or `--recompute` is not valid.
    """
    train = {key: given[key] for key in TRAIN_FLAGS if key in given}
    if given.get("synthetic"):
        if "dataset" in train or "data_dir" in train:
            raise SretError("--synthetic cannot be combined with --dataset or --data-dir", USAGE)
        train["dataset"] = "synthetic"
    if "compile_" in given:
        train["compile"] = given["compile_"]
    if "recompute" in given:
        train["recompute"] = recompute_of(given["recompute"])
    return train


def note_fitted_slices(spec: Any, field: str, wanted: int) -> None:
    """Prints a note for each stage that takes another number of slices than was asked for."""
    for stage, (slices, tokens) in enumerate(zip(getattr(spec, field), spec.tokens, strict=True)):
        if slices != wanted:
            many = "1 slice" if slices == 1 else f"{slices} slices"
            stderr_console().print(
                f"stage {stage + 1}: its {tokens} tokens take {many}, not {wanted}"
            )


def recompute_of(text: str | None) -> Any:
    """The value of --recompute, checked; None if it was not given."""
    from sret_cli.spec.train import TrainSpec

    if text is None:
        return None
    value: Any = int(text) if text.isdecimal() else text
    return TrainSpec(recompute=value).recompute


def gpu_memory_of(text: str | None) -> int | None:
    """The value of --gpu-memory in bytes; None if it was not given."""
    from sret_cli.spec.quantity import parse_quantity

    return None if text is None else parse_quantity(text)


def training_options(context: typer.Context) -> "RunOptions":
    """How and where to train: the `RunOptions` of a command's flags.

    Raises:
        SretError: the device does not exist, or --gpu-memory is not a number of bytes.
    """
    from sret_cli.spec.options import RunOptions

    flags = context.params
    check_device(flags["device"])
    return RunOptions(
        device=flags["device"],
        workers=flags["workers"],
        gpu_memory=gpu_memory_of(flags["gpu_memory"]),
        checkpoint_every_steps=flags["checkpoint_every_steps"],
        checkpoint_minutes=flags["checkpoint_minutes"],
        tensorboard=flags["tensorboard"],
        shard=flags["shard"],
        retry=retry_kinds(flags["retry"]),
        began_at=utc_now(),
        fail_fast=flags["fail_fast"],
    )


def retry_kinds(given: list[str] | None) -> tuple[str, ...]:
    """The kinds of runs that --retry names.

    Raises:
        SretError: there is no such kind.
    """
    kinds = tuple(kind for text in given or () for kind in text.split(","))
    for kind in kinds:
        if kind not in ("failed", "lost"):
            raise SretError(f"--retry {kind}: choose failed or lost", USAGE)
    return kinds


def engine_options(context: typer.Context) -> "EngineOptions":
    """Who does the runs: the `EngineOptions` of a command's flags, and of the user's defaults.

    Raises:
        SretError: --jobs is neither a number nor "auto", or there is no such engine.
    """
    from sret_cli.study.engines import ENGINES, EngineOptions

    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name != "DEFAULT"
    }
    defaults = {k: v for k, v in user_defaults().items() if k in context.params and k not in given}
    flags = {**ENGINE_FLAGS, **context.params, **defaults}
    if flags["engine"] != "local" and "jobs" not in (*given, *defaults):
        flags["jobs"] = "auto"  # on a cluster, one run at a time is never meant
    jobs, name = flags["jobs"], flags["engine"]
    if name not in ENGINES:
        raise SretError(f"--engine {name}: {nearest_choice(name, list(ENGINES))}", USAGE)
    options = [text for given in flags["slurm"] or () for text in given.split(",")]
    for text in options:
        if not text.partition("=")[0].strip() or "=" not in text:
            raise SretError(f"--slurm {text}: write it as partition=gpu,time=240", USAGE)
    pairs = [text.partition("=") for text in options]
    if jobs != "auto" and not (jobs.isdecimal() and int(jobs) > 0):
        raise SretError(f"--jobs {jobs}: give a number of runs at a time, or auto", USAGE)
    return EngineOptions(
        engine=name,
        address=flags["address"],
        slurm=tuple((key.strip(), value.strip()) for key, _, value in pairs),
        wait=flags["wait"],
        jobs=None if jobs == "auto" else int(jobs),
        gpus_per_run=flags["gpus_per_run"],
        runs_per_gpu=flags["runs_per_gpu"],
        retries=flags["retries"],
    )


def only_runs(study: "Study", condition: str | None) -> "Study":
    """The study with the runs that meet a condition.

    Raises:
        SretError: the condition is none, or no run meets it.
    """
    from sret_cli.study.rows import planned_row
    from sret_cli.study.where import parse_condition

    if condition is None:
        return study
    holds = parse_condition(condition).holds
    runs = tuple(run for run in study.runs if holds(planned_row(run)))
    if not runs:
        raise SretError(f"none of {len(study.runs)} runs meets {condition!r}", USAGE)
    return replace(study, runs=runs)


def check_device(name: str | None) -> None:
    """Raises if a device does not exist, before anything is done."""
    if name not in (None, "auto", "cpu"):
        from sret_cli.runtime.device import choose_device

        choose_device(str(name))


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Table, key and value of a `--set model.mlp_ratio=4`.

    Raises:
        SretError: the text has another form, or names no field.
    """
    from sret_cli.study.points import check_key

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
    """The given fields of a model, and those that texts such as "model.mlp_ratio=4" set.

    Raises:
        SretError: a text has another form, or names no field of the model.
    """
    tables: dict[str, Table] = {"model": dict(given or {})}
    apply_settings(tables, settings, trains=False)
    return tables["model"]


def apply_settings(tables: dict[str, Table], settings: list[str], trains: bool) -> None:
    """Adds the values of texts such as "train.lr=1e-3" to tables of flags.

    Raises:
        SretError: a text has another form, or names no field, or its field already has a value.
    """
    from sret_cli.spec.run import put

    for table, key, value in map(parse_setting, settings):
        if table == "train" and not trains:
            raise SretError(f"--set train.{key}: nothing is trained here; use it with `sret train`")
        outer, _, inner = key.partition(".")
        known = tables[table].get(outer, {}) if inner else tables[table]
        if isinstance(known, dict) and (inner or outer) in known:
            raise second_value_error(table, key, value, known[inner or outer])
        put(tables[table], key, value)


def second_value_error(table: str, key: str, value: Any, first: Any) -> SretError:
    """The error for a `--set` of a field that already has a value."""
    return SretError(
        f"--set {table}.{key}={value} is the second value of {table}.{key}, after {first!r}; "
        "leave one of the two out",
        USAGE,
    )


def study_from_flags(
    path: Path | None,
    model: Table,
    train: Table | None,
    settings: list[str],
    max_runs: int | None = None,
) -> "Study":
    """The study of a file, or the one run that flags describe.

    Next to a file only two things may be given: `data_dir`, because the run id does not depend on
    where the images are, and fields of `[train]` by `--set`, which replace those of the file.

    Args:
        path: a study file, or None.
        model: values of `[model]`, without those that were not given.
        train: the same for `[train]`; None if nothing is trained.
        settings: texts such as "model.mlp_ratio=4".
        max_runs: how many runs the file may have, if that was given.
    """
    from sret_cli.study.file import MOST_RUNS, Study, load_study
    from sret_cli.study.resolve import resolve_run

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
    return load_study(path, tables["train"], max_runs or MOST_RUNS)
