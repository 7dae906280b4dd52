"""Lines of a run's `metrics.jsonl`, also of one that is still written."""

import json
from pathlib import Path
from typing import Any


def read_metrics(directory: Path, steps: bool = False) -> list[dict[str, Any]]:
    """The lines of the epochs of a run, with those of its steps if wanted.

    A line that is not whole, as the last one of a run under way may be, is left out.

    Args:
        directory: the run's directory; without metrics there are no lines.
        steps: whether to read the lines of steps as well, which are many.
    """
    try:
        data = (directory / "metrics.jsonl").read_bytes()
    except OSError:
        return []
    lines = []
    for line in data.split(b"\n"):
        if steps or b'"top1_percent"' in line:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                lines.append(found)
    return lines
