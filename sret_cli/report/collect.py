"""What a report is about: rows of studies, runs and directories, with what is missing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sret_cli.report.columns import heading
from sret_cli.report.groups import IGNORED
from sret_cli.report.summary import SHOWN_FAILURES, field_text
from sret_cli.runtime.errors import DATA, SretError
from sret_cli.spec.run import Row
from sret_cli.study.file import load_report, study_question
from sret_cli.study.plan import match_rows
from sret_cli.study.rows import rows_by_directory
from sret_cli.study.view import ReportSpec
from sret_cli.study.where import rows_where


@dataclass(frozen=True)
class Source:
    """What one argument of `sret report` names.

    Attributes:
        label: name of the study, or the path as it was given.
        rows: rows by the directories of their runs.
        spec: what the study file wants to be shown.
        question: the comment that heads the study file.
        missing: labels of the file's runs that have no row.
        others: rows of the study that its file does not have.
    """

    label: str
    rows: Mapping[Path, Row]
    spec: ReportSpec = field(default_factory=ReportSpec)
    question: str = ""
    missing: Sequence[str] = ()
    others: int = 0


@dataclass(frozen=True)
class Collection:
    """Rows to report, and what has to be said about them.

    Attributes:
        title: names of the studies.
        question: the question of the studies.
        rows: rows by the directories of their runs.
        spec: what to show.
        missing: labels of runs that have no row.
        notes: sentences about what is not in the rows, and about what differs between studies.
        sources: where the rows come from.
    """

    title: str
    question: str
    rows: Mapping[Path, Row]
    spec: ReportSpec
    missing: Sequence[str]
    notes: Sequence[str]
    sources: Sequence[Source]


def collect(
    paths: Sequence[Path],
    runs: Path,
    every: bool = False,
    values: Mapping[str, Any] | None = None,
    on_damaged: Callable[[SretError], None] | None = None,
) -> Collection:
    """Collects the rows of study files, runs and directories of runs.

    Args:
        paths: study files, runs or directories; `runs` if there are none.
        runs: the directory of all runs.
        every: also take runs of a study that its file does not have.
        values: keys of `[report]` that take precedence over those of the files.
        on_damaged: called with the error of each damaged row, which is left out.

    Raises:
        SretError: a path does not exist, there are no rows, or a value is wrong.
    """
    sources = [_source(path, runs, every, on_damaged) for path in paths or (runs,)]
    sources = _with_distinct_labels(sources, paths)
    specs = [source.spec for source in sources]
    spec = specs[0] if all(other == specs[0] for other in specs) else ReportSpec()
    spec = spec.with_values(**values or {}).checked()
    found = {directory: row for source in sources for directory, row in source.rows.items()}
    if not found:
        where = ", ".join(map(str, paths or (runs,)))
        raise SretError(
            f"no finished runs in {where}; `sret train` or `sret run STUDY` makes some", DATA
        )
    kept = {id(row) for row in rows_where(list(found.values()), spec.where)}
    rows = {directory: row for directory, row in found.items() if id(row) in kept}
    if not rows:
        raise SretError(f"none of {len(found)} runs meets the condition {spec.where!r}", DATA)
    missing = [label for source in sources for label in source.missing]
    notes = [missing_note(len(found), missing)] * bool(missing)
    notes += [
        f"{source.others} other runs of {source.label} are not in its file; --all shows them"
        for source in sources
        if source.others and not every
    ]
    notes += [f"{len(found) - len(rows)} runs do not meet {spec.where!r}"] * (
        len(rows) < len(found)
    )
    difference = study_differences(list(rows.values()))
    notes += [f"The studies differ in {difference}"] * bool(difference)
    questions = dict.fromkeys(source.question for source in sources if source.question)
    return Collection(
        title=", ".join(dict.fromkeys(str(row["study"]) for row in rows.values())),
        question="\n\n".join(questions),
        rows=rows,
        spec=spec,
        missing=missing,
        notes=notes,
        sources=sources,
    )


def missing_note(found: int, missing: Sequence[str]) -> str:
    """How many runs have rows, and which have none; the first five."""
    shown = "; ".join(missing[:SHOWN_FAILURES]) + "; …" * (len(missing) > SHOWN_FAILURES)
    return f"{found} of {found + len(missing)} runs; missing: {shown}"


def study_differences(rows: Sequence[Row]) -> str:
    """What differs between studies, of what is the same within each of them."""
    studies: dict[str, list[Row]] = {}
    for row in rows:
        studies.setdefault(str(row.get("study")), []).append(row)
    if len(studies) < 2:
        return ""
    keys = dict.fromkeys(k for row in rows for k in row if k.startswith(("model.", "train.")))
    texts = []
    for key in (k for k in keys if k not in IGNORED):
        values = {
            name: {field_text(row, key) for row in members} for name, members in studies.items()
        }
        if all(len(v) == 1 for v in values.values()) and len(set.union(*values.values())) > 1:
            told = ", ".join(f"{next(iter(v))} ({name})" for name, v in values.items())
            texts.append(f"{heading(key)}: {told}")
    return "; ".join(texts)


def _source(
    path: Path, runs: Path, every: bool, on_damaged: Callable[[SretError], None] | None
) -> Source:
    if path.suffix != ".toml" or path.is_dir():
        rows = rows_by_directory(path, on_damaged)
        return Source(str(path), rows)
    spec = load_report(path)
    directory = runs / path.stem
    found = rows_by_directory(directory, on_damaged)
    plan = match_rows(path, list(found.values()))
    wanted = [*plan.rows, *(plan.others if every else ())]
    places = {row["run_id"]: place for place, row in found.items()}
    return Source(
        label=path.stem,
        rows={places[row["run_id"]]: row for row in wanted},
        spec=spec,
        question=study_question(path),
        missing=plan.missing,
        others=len(plan.others),
    )


def _with_distinct_labels(sources: Sequence[Source], paths: Sequence[Path]) -> list[Source]:
    """Sources whose studies have different names: the path where two have one name."""
    names = [{str(row["study"]) for row in source.rows.values()} for source in sources]
    made = []
    for index, source in enumerate(sources):
        others = set().union(*names[:index], *names[index + 1 :])
        clash = names[index] & others
        rows = {
            place: {**row, "study": str(paths[index])} if row["study"] in clash else row
            for place, row in source.rows.items()
        }
        made.append(
            Source(
                label=source.label,
                rows=rows,
                spec=source.spec,
                question=source.question,
                missing=source.missing,
                others=source.others,
            )
        )
    return made
