"""Which runs are seeds of one setting, and which settings form a series in a figure.

Tables and figures group by these functions alone. Values are compared as they are, never as they
are shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sret_cli.runtime.errors import SretError
from sret_cli.spec.contents import CONTENTS_OF
from sret_cli.spec.run import BASELINE, HANDLING, SHARED, Row
from sret_cli.study.axes import varying_fields

SEED = "train.seed"
# Paths and how failures are handled do not change what a run does.
IGNORED = {SEED, *(f"train.{name}" for name in (*CONTENTS_OF, *HANDLING))}
# Fields that follow from depth, or that a twin has instead of sharing: left out of a legend where
# the axis and the role tell the settings apart without them.
DEPENDENT = (
    *("model.recursions", "model.order", "model.blocks", "model.embed_dims", "model.num_heads"),
    "name",
)
# The seed chooses the images that `data_sample_sha256` is of, so that it differs between seeds.
CHOSEN = (
    "study",
    "name",
    "role",
    *sorted({name for names in CONTENTS_OF.values() for name in names} - {"data_sample_sha256"}),
)


@dataclass(frozen=True)
class Group:
    """The runs of one setting, which differ in their seed alone."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """The row of the first seed, which has every setting of the group."""
        return self.rows[0]

    def values(self, column: str) -> list[float]:
        """The measurements of a column, without runs that have none."""
        return [row[column] for row in self.rows if row.get(column) is not None]


def role_of(row: Row) -> str:
    """The role of a run; for rows of earlier versions, by the name that `twins` gave it."""
    if row.get("role"):
        return str(row["role"])
    name = str(row.get("name") or "")
    for kind in ("layers", "params", "macs"):
        if name.endswith(f" twin {kind}"):
            return f"twin {kind}"
    is_plain = row.get("model.share") == 1 and row.get("model.recursions") == 1
    return BASELINE if row.get("model.backbone") and is_plain else SHARED


def setting(row: Row) -> str:
    """Everything about a run but its seed, as text that is equal for equal settings."""
    fields = {
        key: value
        for key, value in row.items()
        if key.startswith(("model.", "train.")) and key not in IGNORED
    }
    fields |= {key: row.get(key) for key in CHOSEN} | {"role": role_of(row)}
    return json.dumps([fields, row.get("continues") is not None], sort_keys=True, default=list)


def group_seeds(rows: Sequence[Row]) -> list[Group]:
    """The rows of each setting together, in the order of their first rows.

    Two rows with one seed are never seeds of each other: the second starts a group of its own.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    seen: dict[tuple[str, str], int] = {}
    for row in rows:
        key, seed = setting(row), json.dumps(row.get(SEED))
        number = seen[key, seed] = seen.get((key, seed), -1) + 1
        groups.setdefault((key, number), []).append(row)
    return [Group(tuple(members)) for members in groups.values()]


def series_fields(
    groups: Sequence[Group], x: str, chosen: Sequence[str] | None = None
) -> list[str]:
    """The fields that tell the series of a figure over x apart.

    A series has one group at each value of x, so that no line joins different settings.

    Args:
        groups: what is drawn.
        x: the column along the x axis.
        chosen: fields to group by, in place of all that vary.

    Raises:
        SretError: the chosen fields leave different settings in one series.
    """
    rows = [group.first for group in groups]
    fields = list(varying_fields(rows)) if chosen is None else list(chosen)
    roles = {role_of(row) for row in rows}
    if chosen is None and len(roles) > 1 and "role" not in fields:
        fields = ["role", *(field for field in fields if field != "name")]
    fields = [field for field in fields if field != x]
    if chosen is None:
        for field in [f for f in fields if f in DEPENDENT]:
            without = [f for f in fields if f != field]
            if is_one_each(rows, without, x):
                fields = without
        for field in ("layers", "model.recursions", *_settings_that_vary(rows)):
            if is_one_each(rows, fields, x):
                break
            if field not in (*fields, x) and len({json.dumps(r.get(field)) for r in rows}) > 1:
                fields.append(field)
    if chosen is not None and not is_one_each(rows, fields, x):
        raise SretError(
            f"group = {list(chosen)} leaves different settings at one {x}; add a field to it: "
            f"{', '.join(series_fields(groups, x)) or 'none is left'}"
        )
    return fields


def series_key(row: Row, fields: Sequence[str]) -> str:
    """The values of a row in some fields, as text that is equal for equal values."""
    return json.dumps([role_of(row) if f == "role" else row.get(f) for f in fields], default=list)


def is_one_each(rows: Sequence[Row], fields: Sequence[str], x: str) -> bool:
    """Whether no two rows of a series have the same value of x."""
    places = [(series_key(row, fields), json.dumps(row.get(x))) for row in rows]
    return len(set(places)) == len(places)


def _settings_that_vary(rows: Sequence[Row]) -> list[str]:
    keys = dict.fromkeys(k for row in rows for k in row if k.startswith(("model.", "train.")))
    return [
        key
        for key in keys
        if key not in IGNORED and len({json.dumps(row.get(key), default=list) for row in rows}) > 1
    ]
