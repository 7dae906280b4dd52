"""What a report shows: the keys of `[report]` and `[[report.figures]]`, which are flags as well."""

from typing import Any, Literal, get_args

from pydantic import field_validator

from sret_cli.runtime.errors import SretError, nearest_choice
from sret_cli.spec.model import PER_STAGE, ModelSpec
from sret_cli.spec.run import Table
from sret_cli.spec.strict import Strict, as_tuples
from sret_cli.spec.train import TrainSpec
from sret_cli.study.points import is_timm_argument
from sret_cli.study.rows import MEASUREMENTS
from sret_cli.study.where import column_named, known_columns, parse_condition

Interval = Literal["ci95", "sd", "sem", "none"]
Kind = Literal[
    "accuracy",
    "loss",
    "cost",
    "pareto",
    "sharing",
    "iso-params",
    "iso-flops",
    "curves",
    "learning-rate",
    "heat-map",
    "law",
]
KINDS: tuple[str, ...] = get_args(Kind)
NUMBERS = {
    f"{table}.{name}"
    for table, cls in (("model", ModelSpec), ("train", TrainSpec))
    for name, field_info in cls.model_fields.items()
    if field_info.annotation in (int, float)
}


class FigureSpec(Strict):
    """One figure of a report."""

    kind: Kind
    """What the figure shows; `docs/reports.md` has a picture of each kind."""
    x: str | None = None
    """Column along the x axis; by default what the kind is about."""
    y: str | None = None
    """Column along the y axis; by default what the kind is about."""
    group: tuple[str, ...] | None = None
    """Fields that tell the series apart; by default the roles, and what else is needed."""
    where: str | None = None
    """Condition for the rows that are shown, such as "slices == 4"."""
    name: str | None = None
    """Name of the files, and title of the figure on the page; by default the kind."""
    law: Literal["power", "exponential", "chinchilla", "recurrence"] = "power"
    """Law that the kind "law" fits."""

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, name: str | None) -> str | None:
        plain = name is None or name.replace("-", "").replace("_", "").isalnum()
        if not plain or name is not None and len(name) > 100:
            raise ValueError("use letters, digits, - and _, at most 100")
        return name


class ReportSpec(Strict):
    """What the report of a study shows."""

    x: str = "layers"
    """Column along the x axis of the figures."""
    y: tuple[str, ...] = ("top1_percent", "macs")
    """Columns along the y axes, one figure each."""
    columns: tuple[str, ...] = ()
    """Columns of the tables; by default what varies, parameters, FLOPs and top-1."""
    where: str | None = None
    """Condition for the rows that are shown, such as "slices == 4 and layers >= 8"."""
    sort: tuple[str, ...] = ()
    """Columns that order the lines of tables; "-top1_percent" puts the largest first."""
    group: tuple[str, ...] | None = None
    """Fields that tell the series of figures apart; by default roles and what else is needed."""
    interval: Interval = "ci95"
    """Interval behind "±" and bands: of the mean over seeds, standard deviation, or error."""
    width: Literal["column", "page"] = "page"
    """Width of the figures in a paper: 3.25 inches (one column) or 6.75 inches."""
    published: bool = False
    """Whether published models stand behind one's own in figures of accuracy over cost."""
    figures: tuple[FigureSpec, ...] = ()
    """Figures to draw; by default those that the rows allow."""

    @classmethod
    def of(cls, table: Table) -> "ReportSpec":
        """The spec of a `[report]` table, with the full names of its columns.

        Raises:
            SretError: a value is wrong, a column does not exist, or an axis is not a number.
        """
        table = as_tuples_by_key(table)
        figures = table.get("figures", ())
        if not isinstance(figures, tuple) or not all(isinstance(f, dict) for f in figures):
            raise SretError("[report] figures: write each figure as [[report.figures]]")
        table["figures"] = tuple(_figure(number, f) for number, f in enumerate(figures, 1))
        try:
            return cls(**table).checked()
        except SretError as error:
            raise SretError(f"[report] {error}") from None

    def checked(self) -> "ReportSpec":
        """The spec with the full names of its columns.

        Raises:
            SretError: a column does not exist, an axis is not a number, or `where` is no condition.
        """
        if self.where is not None:
            parse_condition(self.where)
        return self.model_copy(
            update={
                "x": axis_column(self.x),
                "y": tuple(map(axis_column, self.y)),
                "columns": tuple(map(full_column, self.columns)),
                "sort": tuple(_sort_key(key) for key in self.sort),
                "group": None if self.group is None else tuple(map(full_column, self.group)),
            }
        )


def _figure(number: int, table: Table) -> FigureSpec:
    try:
        found = FigureSpec(**table)
        if found.where is not None:
            parse_condition(found.where)
        return found.model_copy(
            update={
                "x": None if found.x is None else axis_column(found.x),
                "y": None if found.y is None else axis_column(found.y),
                "group": None if found.group is None else tuple(map(full_column, found.group)),
            }
        )
    except SretError:
        kind = table.get("kind")
        if isinstance(kind, str) and kind not in KINDS:
            error = SretError(f"unknown kind {kind!r}; {nearest_choice(kind, list(KINDS))}")
        raise SretError(f"[[report.figures]] {number}: {error}") from None


def as_tuples_by_key(table: Table) -> dict[str, Any]:
    """A table whose lists are tuples, but not the tables in them."""
    return {
        key: tuple(as_tuples_by_key(v) if isinstance(v, dict) else as_tuples(v) for v in value)
        if isinstance(value, list)
        else value
        for key, value in table.items()
    }


def full_column(name: str) -> str:
    """The full name of a column that every row can have.

    Raises:
        SretError: no column has this name.
    """
    return column_named(name, known_columns())


def axis_column(name: str) -> str:
    """The full name of a column that is a number, or one for each stage, in every row.

    Raises:
        SretError: no column has this name, or it is not a single number.
    """
    found = full_column(name)
    stages = found.removeprefix("model.") in PER_STAGE
    if not (stages or found in MEASUREMENTS or found in NUMBERS or is_timm_argument(found)):
        raise SretError(
            f"{name} is not a single number for each run and cannot be an axis; "
            "use layers, or another measurement"
        )
    return found


def _sort_key(key: str) -> str:
    return f"-{full_column(key[1:])}" if key.startswith("-") else full_column(key)
