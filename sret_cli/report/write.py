"""The report of a study as files: tables and figures."""

from collections.abc import Sequence
from pathlib import Path

from sret_cli.report.comparisons import COMPARISON_NOTE, compare, comparison_cells
from sret_cli.report.tables import RUN_TABLE, caption, csv_text, markdown_table, table_cells
from sret_cli.runtime.files import make_directory, write_atomically
from sret_cli.spec.run import Row
from sret_cli.study.view import ReportSpec

COST = ("params", "macs", "peak_memory_bytes", "activation_bytes")


def write_report(rows: Sequence[Row], spec: ReportSpec, directory: Path) -> list[Path]:
    """Writes the tables, and each figure that has measured values; returns the files.

    `table.csv` has all rows and columns, unrounded. `comparisons.md` is written if a shared model
    and one of its controls have results.
    """
    from sret_cli.report.figures import can_plot, plot_rows, save_figure

    make_directory(directory)
    files = [directory / "table.md", directory / "table.csv"]
    write_atomically(files[0], markdown_table(*table_cells(rows, RUN_TABLE), caption(rows)))
    write_atomically(files[1], csv_text(rows))
    if comparisons := compare(rows):
        files.append(directory / "comparisons.md")
        table = markdown_table(*comparison_cells(comparisons, "**{}**"), COMPARISON_NOTE)
        write_atomically(files[-1], table)
    figures = {"accuracy": ["top1_percent"], "cost": _cost_columns(rows)}
    shown = {column for columns in figures.values() for column in columns}
    figures |= {column: [column] for column in spec.y if column not in shown}
    for name, columns in figures.items():
        measured = [c for c in columns if any(can_plot(row, spec.x, c) for row in rows)]
        if measured:
            files += save_figure(plot_rows(rows, spec.x, measured), directory / name)
    return files


def _cost_columns(rows: Sequence[Row]) -> list[str]:
    measured = any(row.get("peak_memory_bytes") is not None for row in rows)
    return [c for c in COST if c != ("activation_bytes" if measured else "peak_memory_bytes")]
