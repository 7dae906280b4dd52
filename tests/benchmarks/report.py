"""How long a report of many runs takes, and how large its page is.

    python tests/benchmarks/report.py [--runs 1000] [--epochs 100] [--steps 10]

Writes rows and metrics of runs as training does, and reports them by `sret report` as a process.
The time is compared with that of a tenth of the runs, in alternating rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sret_cli.study.file import study_from_tables
from sret_cli.study.rows import planned_row

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def write_runs(runs: Path, count: int, epochs: int, steps: int) -> None:
    """Writes `count` runs of ten depths under `runs`, whose accuracy grows along their epochs."""
    grid = {"model.recursions": list(DEPTHS), "train.seed": list(range(count // len(DEPTHS)))}
    tables = {"model": {"preset": "nano"}, "train": {"epochs": epochs}, "grid": grid}
    for number, run in enumerate(study_from_tables("many", tables).runs):
        directory = runs / "many" / run.run_id
        directory.mkdir(parents=True)
        top1 = 50 + 10 * run.train.seed / count + 0.1 * run.model.layers
        row = planned_row(run) | {
            **{"params": 331_842, "macs": 10**6 * run.model.layers, "test_images": 10_000},
            **{"top1_percent": top1, "test_loss": 1.0, "status": "done", "train_seconds": 60.0},
            **{"started_at": f"2026-01-01T00:{number // 60 % 60:02}:{number % 60:02}"},
        }
        (directory / "row.json").write_text(json.dumps(row))
        (directory / "config.json").write_text(json.dumps(run.spec()))
        with open(directory / "metrics.jsonl", "w") as file:
            for epoch in range(1, epochs + 1):
                for step in range(steps):
                    line = {"step": epoch * steps + step, "epoch": epoch, "loss": 2.3, "lr": 1e-3}
                    file.write(json.dumps(line) + "\n")
                line = {"epoch": epoch, "train_loss": 2.0 / epoch, "test_loss": 1.0 + 1 / epoch}
                file.write(json.dumps({**line, "top1_percent": top1 * epoch / epochs}) + "\n")


def seconds(runs: Path) -> float:
    """Seconds of one `sret report` as a process."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "sret_cli", "report", "--runs", str(runs)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints seconds, their ratio, and the size of the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        many, few = Path(folder, "many"), Path(folder, "few")
        write_runs(many, given.runs, given.epochs, given.steps)
        write_runs(few, given.runs // 10, given.epochs, given.steps)
        rounds = [(seconds(many), seconds(few)) for _ in range(given.rounds)]
        for runs, times in zip((many, few), zip(*rounds, strict=True), strict=True):
            page = (runs / "report" / "report.html").stat().st_size
            rows = len(list(runs.glob("*/*/row.json")))
            print(
                f"{rows:,} runs of {given.epochs} epochs: {statistics.median(times):.1f} s "
                f"({min(times):.1f} to {max(times):.1f}); page {page / 1e6:.1f} MB"
            )
        ratios = [a / b for a, b in rounds]
        print(f"ten times the runs: {statistics.median(ratios):.2f} times the time")


if __name__ == "__main__":
    main()
