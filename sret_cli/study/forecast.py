"""What a study will take, before anything starts: costs, memory and times of its runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sret_cli.runtime.errors import SretError
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Row, Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.execute import measure_cost, predicted_memory_columns
from sret_cli.study.pace import measured_speed
from sret_cli.study.rows import read_row
from sret_cli.study.shares import Share

MEASURED = 3  # models whose speed is measured; that of the others lies between
DIGITS_IMAGES = 1_437  # of training


@dataclass(frozen=True)
class Forecast:
    """What one run will take.

    Attributes:
        run: the run.
        state: done, failed, begun or waiting.
        row: params, macs and predicted memory.
        seconds: of its training; None if it is done or its speed is not known.
    """

    run: Run
    state: str
    row: Row
    seconds: float | None


def forecast(
    runs: Sequence[Run],
    root: Any,
    options: RunOptions,
    shares: Sequence[Share],
    note: Callable[[str], None],
) -> list[Forecast]:
    """The forecast of each run, after a short measurement of a few of their models.

    Args:
        runs: the runs of a study, whose contents are known.
        root: the directory of all runs.
        options: how runs are executed.
        shares: the shares of the machine that runs will have.
        note: receives what could not be measured.
    """
    costs: dict[Any, Row] = {}
    for run in runs:
        if run.model not in costs:
            costs[run.model] = measure_cost(run, options)
    states = {run.run_id: _state(run, root) for run in runs}
    left = [run for run in runs if states[run.run_id] in ("waiting", "begun") and run.train]
    speeds = _speeds(left, costs, shares, note)
    images = {run.run_id: training_images(run) for run in left}
    found = []
    for run in runs:
        row = {**costs[run.model], **predicted_memory_columns(run, options)}
        speed = _between(speeds, costs[run.model]["macs"])
        seconds = None
        if run.run_id in images and speed and run.train is not None:
            seconds = images[run.run_id] * run.train.epochs / speed
        found.append(Forecast(run, states[run.run_id], row, seconds))
    return found


def study_seconds(found: Sequence[Forecast], jobs: int) -> float:
    """The time of a study on some workers: equal parts, or the longest run if that is more."""
    times = [f.seconds for f in found if f.seconds is not None]
    return max(sum(times) / jobs, max(times, default=0.0))


def training_images(run: Run) -> int:
    """The number of images of an epoch; that of CIFAR-10 for random images."""
    train = run.train or TrainSpec()
    if train.dataset == "digits":
        return DIGITS_IMAGES
    if train.dataset == "synthetic":
        return 50_000
    from sret_cli.training.identify import find_splits

    splits = find_splits(train.dataset, train.data_dir, False, train.label_column)
    classes = splits["train"].fingerprint(train.seed).classes
    return sum(int(values[0]) for values in classes.values())


def _state(run: Run, root: Any) -> str:
    directory = run.directory(root)
    row = read_row(directory)
    if row is None:
        return "begun" if directory.exists() else "waiting"
    if row["error"]:
        return str(row["status"] or "failed")
    return "done" if run.train is None or row["final_loss"] is not None else "begun"


def _speeds(
    runs: Sequence[Run],
    costs: dict[Any, Row],
    shares: Sequence[Share],
    note: Callable[[str], None],
) -> dict[float, float]:
    """Images per second of one worker, by the multiply-adds of the model that was measured."""
    models = {costs[run.model]["macs"]: run for run in runs}
    ordered = sorted(models)
    step = max((len(ordered) - 1) / max(MEASURED - 1, 1), 1)
    chosen = {ordered[min(round(k * step), len(ordered) - 1)] for k in range(MEASURED) if ordered}
    speeds: dict[float, float] = {}
    for macs in sorted(chosen):
        try:
            speeds[macs] = measured_speed(models[macs], shares) / len(shares)
        except SretError as error:
            note(f"{models[macs].name}: {error}")
    return speeds


def _between(speeds: dict[float, float], macs: float) -> float | None:
    """The speed of a model between those that were measured, in proportion on both logarithms."""
    if not speeds:
        return None
    known = sorted(speeds)
    if len(known) == 1:
        return speeds[known[0]] * known[0] / macs
    low = max((k for k in known[:-1] if k <= macs), default=known[0])
    high = known[known.index(low) + 1]
    slope = math.log(speeds[high] / speeds[low]) / math.log(high / low)
    return speeds[low] * math.exp(slope * math.log(macs / low))
