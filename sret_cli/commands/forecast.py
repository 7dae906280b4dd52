"""What `--dry-run` prints."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sret_cli.commands.output import print_json, print_table, stderr_console

if TYPE_CHECKING:
    from sret_cli.spec.options import RunOptions
    from sret_cli.study.engines import EngineOptions
    from sret_cli.study.file import Study


def show_forecast(
    study: "Study", root: Path, options: "RunOptions", engine: "EngineOptions", as_json: bool
) -> None:
    """Prints the runs of a study with their costs, memory, states and predicted times."""
    from sret_cli.report.columns import COLUMNS, FLOPS_NOTE
    from sret_cli.report.table import NOTHING, text_table
    from sret_cli.study.axes import run_labels
    from sret_cli.study.engines import prepared
    from sret_cli.study.forecast import forecast, study_seconds
    from sret_cli.study.local import choose_shares
    from sret_cli.study.rows import planned_row
    from sret_cli.study.worker import Work

    note = stderr_console().print
    study = prepared(study, root, note, trains=True)
    shares = choose_shares(Work(study, root, options), engine, note)
    found = forecast(study.runs, root, options, shares, note)
    labels = run_labels([planned_row(run) for run in study.runs])
    total = study_seconds(found, len(shares))
    if as_json:
        return print_json(
            [
                {"run": label, "run_id": f.run.run_id, "state": f.state, "seconds": f.seconds}
                | {key: f.row.get(key) for key in ("params", "macs", "training_memory_bytes")}
                for label, f in zip(labels, found, strict=True)
            ]
        )

    def text(row: dict[str, Any], column: str) -> str:
        value = row.get(column)
        return NOTHING if value is None else COLUMNS[column].text(value)

    columns = ("params", "macs", "training_memory_bytes")
    lines = [
        [label, f.state, *(text(f.row, c) for c in columns), _time(f.seconds)]
        for label, f in zip(labels, found, strict=True)
    ]
    headings = ["Run", "State", *(COLUMNS[c].heading for c in columns), "Training"]
    left = sum(f.seconds is not None for f in found)
    told = (
        f"{left} of {len(found)} runs are left: about {_time(total)} with {len(shares)} at a time"
    )
    print_table(text_table(headings, lines, notes=[told, FLOPS_NOTE]))


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else str(timedelta(seconds=max(round(seconds), 1)))
