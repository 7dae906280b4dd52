"""The answer of a study in numbers: a few sentences from its rows."""

from collections.abc import Sequence
from typing import Any

from sret_cli.report.columns import COLUMNS, heading
from sret_cli.report.comparisons import Comparison, excludes_zero
from sret_cli.report.groups import Group, group_seeds, role_of
from sret_cli.report.intervals import spread
from sret_cli.report.summary import ROLES, field_text, field_value, identity_fields, order
from sret_cli.spec.run import BASELINE, Row

MOST_EFFECTS = 3  # fields whose effects are told


def answers(rows: Sequence[Row], comparisons: Sequence[Comparison], missing: int) -> list[str]:
    """Sentences about rows: what is not done, paired differences, effects of fields, best runs."""
    failed = sum(bool(row.get("error")) for row in rows)
    total = len(rows) + missing
    parts = [f"{len(rows) - failed} of {total} runs are done"]
    parts += [f"{failed} failed"] * bool(failed) + [f"{missing} have no row yet"] * bool(missing)
    status = [f"{'; '.join(parts)}."] * bool(failed or missing)
    return [*status, *_differences(comparisons), *_effects(rows), *_best(rows)]


def _effects(rows: Sequence[Row]) -> list[str]:
    """What each field that varies does to top-1, between runs that are equal in all else."""
    done = [row for row in rows if row.get("top1_percent") is not None and not row.get("error")]
    identity = identity_fields(done) if done else []
    fields = [f for f in identity if f.startswith(("model.", "train."))]
    sentences = []
    for field in fields[:MOST_EFFECTS]:
        others = [f for f in (*identity, "layers", "train.seed", "role") if f != field]
        by_value: dict[str, dict[tuple[Any, ...], float]] = {}
        for row in sorted(done, key=lambda row: order(field_value(row, field))):
            if row.get(field) is not None:
                key = tuple(repr(field_value(row, f)) for f in others)
                by_value.setdefault(field_text(row, field), {})[key] = row["top1_percent"]
        first, *rest = by_value or [""]
        for value in rest:
            shared = [key for key in by_value[value] if key in by_value[first]]
            if len(shared) > 1:
                found = spread([by_value[value][key] - by_value[first][key] for key in shared])
                text = COLUMNS["top1_percent"].difference(found.mean, found.half_width)
                sentences.append(
                    f"{heading(field)} {value} minus {first}, all else equal: {text} points of "
                    f"top-1 (95 % interval over {len(shared)} pairs of runs)."
                )
    return sentences


def _best(rows: Sequence[Row]) -> list[str]:
    """The setting with the highest mean accuracy of each role."""
    groups = [g for g in group_seeds(rows) if g.values("top1_percent")]
    fields = [f for f in identity_fields([g.first for g in groups]) if f != "role"]
    sentences = []
    for role in ROLES:
        members = [g for g in groups if role_of(g.first) == role]
        if members:
            best = max(members, key=lambda g: spread(g.values("top1_percent")).mean)
            sentences.append(f"Best {role}: {_setting(best, fields)}: {_accuracy(best)}.")
    return sentences


def _setting(group: Group, fields: Sequence[str]) -> str:
    return ", ".join(
        field_text(group.first, f)
        if f in ("name", "study")
        else f"{words(heading(f))} {field_text(group.first, f)}"
        for f in fields
        if group.first.get(f) is not None
    )


def words(heading: str) -> str:
    """A heading within a sentence: "slices", but "NLLs"."""
    return heading if heading[1:2].isupper() else heading[:1].lower() + heading[1:]


def _accuracy(group: Group) -> str:
    mean, half_width, n = spread(group.values("top1_percent"))
    text = f"{COLUMNS['top1_percent'].text(mean, half_width)} % top-1"
    text += f" ({n} seeds)" if n > 1 else " (one seed)"
    costs = [
        f"{COLUMNS[c].text(group.first[c])} {unit}"
        for c, unit in (("params", "M parameters"), ("macs", "G FLOPs"))
        if group.first.get(c) is not None
    ]
    return ", ".join([text, *costs])


def _differences(comparisons: Sequence[Comparison]) -> list[str]:
    """For each kind of control, the paired difference of the deepest shared model."""
    sentences = []
    sure = sum(excludes_zero(c.top1) for c in comparisons)
    if comparisons and not sure:
        sentences.append(
            f"No difference between shared models and their controls is sure: none of "
            f"{len(comparisons)} paired differences in top-1 has a 95 % interval that excludes 0."
        )
    for role in ROLES[1:]:
        found = [c for c in comparisons if role_of(c.control.first) == role]
        if not found:
            continue
        deepest = max(found, key=lambda c: c.shared.first.get("layers") or 0)
        clear = sum(excludes_zero(c.top1) for c in found)
        text = COLUMNS["top1_percent"].difference(deepest.top1.mean, deepest.top1.half_width)
        against = deepest.control.first.get("name") if role == BASELINE else role
        ratios = [
            f"{ratio:.2f} times its {what}"
            for ratio, what in (
                (deepest.params_ratio, "parameters"),
                (deepest.macs_ratio, "FLOPs"),
            )
            if ratio is not None
        ]
        layers = deepest.shared.first.get("layers")
        at = f" at {layers:,} layers" if layers else ""
        sentences.append(
            f"Shared minus {against}{at}: {text} points of top-1"
            f"{', with ' * bool(ratios)}{' and '.join(ratios)}."
            + f" The interval excludes 0 in {clear} of {len(found)} comparisons."
            * bool(sure)
        )
    return sentences
