"""Which settings form a line and which stand in one panel of a figure.

A series is a role, or a value of the fields that the user groups by. Further fields that tell
settings apart get a panel for each value, so that no line joins different settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sret_cli.report.columns import heading
from sret_cli.report.groups import Group, role_of, series_fields, series_key
from sret_cli.report.plot_axes import number_in, number_text
from sret_cli.report.plot_style import (
    MOST_SERIES,
    ROLE_LOOKS,
    Look,
    crossed_looks,
    nominal_looks,
    ordered_looks,
    short_labels,
)
from sret_cli.spec.run import Row
from sret_cli.study.axes import format_value

MOST_PANELS = 9


@dataclass(frozen=True)
class Series:
    """Settings with one look and one entry of the legend."""

    label: str
    look: Look
    groups: tuple[Group, ...]
    is_joined: bool = True


@dataclass(frozen=True)
class Panel:
    """The series that one pair of axes shows."""

    title: str
    series: tuple[Series, ...]
    setting: str = ""  # the title of all panels that were one before they were split


@dataclass(frozen=True)
class Arrangement:
    """The panels of a figure, the title of their common legend, and what was left out."""

    panels: tuple[Panel, ...]
    legend_title: str = ""
    note: str = ""
    labels: tuple[str, ...] = ()  # of all series, in the order of the legend


def value_text(row: Row, field: str) -> str:
    """The value of a field for people: equal numbers for all stages are one number."""
    if field == "role":
        return role_of(row)
    value = row.get(field)
    if isinstance(value, list | tuple) and value and len(set(map(str, value))) == 1:
        value = value[0]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        number = number_in(row, field)
        shown = str(value) if number is None else number_text(number)
        return shown if number is None or _reads_back(shown, number) else format_value(value)
    return format_value(value)


def _reads_back(text: str, number: float) -> bool:
    return float(text.replace(",", "")) == number


def arrange(
    groups: Sequence[Group],
    x: str,
    chosen: Sequence[str] | None = None,
    *,
    may_be_loose: bool = True,
) -> Arrangement:
    """The series and panels of a figure over x.

    Args:
        groups: the settings that are drawn; each has a value of x.
        x: the column along the x axis.
        chosen: the fields that form series; by default the role, or one field that varies.
        may_be_loose: whether settings of which hardly two share a line stand as points in one
            panel, whatever fields they differ in.
    """
    groups = list(groups)
    if not groups:
        return Arrangement(())
    lead, rest = split_fields(groups, x, chosen)
    panels = panel_keys(groups, rest)
    is_loose = may_be_loose and (len(panels) > 3 or rest == ["layers"])
    is_loose = is_loose and _hardly_joins(groups, [*lead, *rest])
    if is_loose:
        rest, panels = [], [((), groups)]
    note = ""
    if len(panels) > MOST_PANELS:
        note = (
            f"{len(panels) - MOST_PANELS} of {len(panels)} panels are left out; "
            "choose with `where` or `group`."
        )
        panels = panels[:MOST_PANELS]
    everything = [group for _, members in panels for group in members]
    looks = series_looks(everything, lead)
    made = []
    for key, members in panels:
        title = ", ".join(f"{heading(f)}: {text}" for f, text in zip(rest, key, strict=True))
        (title,) = short_labels([title], 60)
        series = _series(members, lead, x, looks, not is_loose)
        made.append(Panel(title, tuple(series), setting=title))
    made = [part for panel in made for part in _at_most_eight(panel)]
    labels = tuple(label for label, _ in looks.values())
    return Arrangement(tuple(made), legend_title(lead), note, labels)


def legend_title(fields: Sequence[str]) -> str:
    """What the entries of a legend are values of; roles need no title."""
    if list(fields) in ([], ["role"], ["name"]):
        return ""
    words = ["Model" if f == "role" and "name" not in fields else heading(f) for f in fields]
    later = [w[:1].lower() + w[1:] if w[1:2].islower() else w for w in words[1:]]
    (title,) = short_labels([", ".join([words[0], *later])], 60)
    return title


def split_fields(
    groups: Sequence[Group], x: str, chosen: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """The fields that form series, and those that form panels."""
    rows = [group.first for group in groups]
    fields = series_fields(groups, x)
    if chosen is not None:
        lead = [f for f in chosen if f != x and _count(rows, f) > 1]
    elif "role" in fields or len({role_of(row) for row in rows}) > 1:
        lead = ["role"]
    else:
        few = [field for field in fields if _count(rows, field) <= MOST_SERIES]
        lead = (few or ([] if _hardly_joins(groups, fields) else fields))[:1]
    rest = [field for field in fields if field not in lead]
    # What follows from the others is left out: other fields sooner than the role.
    for field in sorted(rest, key=lambda f: f == "role"):
        others = [*lead, *(f for f in rest if f != field)]
        values = {(series_key(row, others), series_key(row, [field])) for row in rows}
        if len(values) == len({key for key, _ in values}):  # it follows from the others
            rest.remove(field)
    return lead, rest


def _hardly_joins(groups: Sequence[Group], fields: Sequence[str]) -> bool:
    """Whether hardly two groups have equal values of the fields, so that there are no lines."""
    return len({series_key(group.first, fields) for group in groups}) > 0.7 * len(groups)


def _count(rows: Sequence[Row], field: str) -> int:
    return len({series_key(row, [field]) for row in rows})


def panel_keys(
    groups: Sequence[Group], fields: Sequence[str]
) -> list[tuple[tuple[str, ...], list[Group]]]:
    """The panels of groups by the values of fields; a group without the fields is in each."""
    found: dict[str, tuple[tuple[str, ...], list[Group]]] = {}
    with_fields = [
        g for g in groups if all(field in g.first or field == "role" for field in fields)
    ]
    everywhere = [g for g in groups if g not in with_fields]
    for group in ordered(with_fields or groups, fields):
        texts = tuple(value_text(group.first, field) for field in fields)
        found.setdefault(series_key(group.first, fields), (texts, []))[1].append(group)
    if with_fields:
        for _, members in found.values():
            members += everywhere
    return list(found.values())


def ordered(groups: Sequence[Group], fields: Sequence[str]) -> list[Group]:
    """Groups by the values of fields: numbers by size, all else in the order of the rows."""
    result = list(groups)
    for field in reversed(fields):
        if field == "role":
            roles = list(ROLE_LOOKS)
            result.sort(key=lambda g: (*roles, role_of(g.first)).index(role_of(g.first)))
        elif any(number_in(group.first, field) is not None for group in result):
            result.sort(key=lambda g, f=field: _order(number_in(g.first, f)))  # type: ignore[misc]
        else:
            seen = list(dict.fromkeys(series_key(g.first, [field]) for g in groups))
            result.sort(key=lambda g, f=field, s=seen: s.index(series_key(g.first, [f])))  # type: ignore[misc]
    return result


def _order(number: float | None) -> float:
    return float("inf") if number is None else number


def series_looks(groups: Sequence[Group], lead: Sequence[str]) -> dict[str, tuple[str, Look]]:
    """The label and the look of each series by its key."""
    members: dict[str, Group] = {}
    for group in ordered(groups, lead):
        members.setdefault(series_key(group.first, lead), group)
    firsts = [group.first for group in members.values()]
    labels = short_labels([", ".join(value_text(row, f) for f in lead) for row in firsts])
    if list(lead) == ["role"]:
        spare = nominal_looks(8)[4:]
        looks = [ROLE_LOOKS.get(role_of(r), spare[i % 4]) for i, r in enumerate(firsts)]
    elif len(lead) == 1 and all(number_in(row, lead[0]) is not None for row in firsts):
        looks = ordered_looks(len(firsts))
    elif len(lead) == 2 and len(firsts) > 3:
        texts = [[value_text(row, field) for field in lead] for row in firsts]
        looks = crossed_looks([(one, other) for one, other in texts])
    else:
        looks = nominal_looks(len(firsts))
    return dict(zip(members, zip(labels, looks, strict=True), strict=True))


def _series(
    groups: Sequence[Group],
    lead: Sequence[str],
    x: str,
    looks: Mapping[str, tuple[str, Look]],
    is_joined: bool,
) -> list[Series]:
    """The series of a panel in the order of their looks, each sorted by x.

    Settings that stand at one place and cannot be told apart get series of their own.
    """
    found: dict[tuple[str, int], list[Group]] = {}
    counts: dict[tuple[str, str], int] = {}
    for group in groups:
        key = series_key(group.first, lead)
        place = series_key(group.first, [x])
        number = counts[key, place] = counts.get((key, place), -1) + 1
        found.setdefault((key, 0 if not is_joined else number), []).append(group)
    made = []
    for key, (label, look) in looks.items():
        for (other, number), members in found.items():
            if other == key:
                members.sort(key=lambda g: number_in(g.first, x) or 0.0)
                again = f"{label} ({number + 1})" if number else label
                made.append(Series(again, look, tuple(members), is_joined))
    return made


def _at_most_eight(panel: Panel) -> list[Panel]:
    """The panel, or several with at most eight series each."""
    count = -(-len(panel.series) // MOST_SERIES)
    if count <= 1:
        return [panel]
    size = -(-len(panel.series) // count)
    parts = [panel.series[i : i + size] for i in range(0, len(panel.series), size)]
    return [
        replace(
            panel,
            title=f"{panel.title} ({number} of {len(parts)})".strip(),
            series=part,
        )
        for number, part in enumerate(parts, 1)
    ]
