"""Rows as a DataFrame, for notebooks."""

from pathlib import Path
from typing import TYPE_CHECKING

from sret_cli.report.groups import role_of
from sret_cli.study.rows import read_rows as read_row_list

if TYPE_CHECKING:
    import pandas as pd


def read_rows(path: str | Path) -> "pd.DataFrame":
    """What runs measured: one record a run, sorted by study and by the time of the start.

    Columns are those of `row.json`: all fields (`model.…`, `train.…`), measurements with their unit
    in the name, `role`, `twin_of` (the ids of the runs that a twin is the control of), and
    `continues` (the id of the run that it trains longer). What was not measured is missing; lists
    such as `model.recursions` are tuples.

    Args:
        path: a run, a study's directory such as `runs/depth`, or the directory of all runs.

    Raises:
        SretError: the directory does not exist, or a row in it is damaged.

    Examples:
        >>> from pathlib import Path
        >>> from sret_cli import read_rows
        >>> from sret_cli.runtime.files import write_json
        >>> run = Path("runs/depth/0123456789")
        >>> run.mkdir(parents=True)
        >>> row = {"study": "depth", "run_id": run.name, "started_at": "2026-01-01", "layers": 8}
        >>> write_json(run / "row.json", {**row, "model.recursions": [2, 2, 2]})
        >>> table = read_rows("runs/depth")
        >>> table[["run_id", "layers", "model.recursions", "role"]].values.tolist()
        [['0123456789', 8, (2, 2, 2), 'shared']]
    """
    import pandas as pd

    always = {"twin_of": None, "continues": None}
    rows = [{**always, **row, "role": role_of(row)} for row in read_row_list(path)]
    return pd.DataFrame(
        [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    )
