"""Kills trainings by SIGKILL and starts them again, until their results are those of no kill.

    python tests/end_to_end/kill_harness.py --kills 100

A kill is at a random time, or at one of the named points of writing. Each run is killed several
times on its way; it counts as lost unless it ends with the same bytes of weights and metrics, the
same checkpoint, and the same row but for times, as a run that was left alone. One process works at
a time.
"""

import argparse
import json
import os
import random
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: its threads would not survive a fork

import kill_points  # noqa: E402
import sklearn.datasets  # noqa: E402, F401
import sklearn.model_selection  # noqa: E402, F401

from sret_cli.commands import app

COMMAND = (
    *("train", "--preset", "nano", "--device", "cpu", "--batch-size", "240"),
    *("--set", "model.embed_dims=[8, 16, 32]", "--set", "model.slices=[4, 2, 1]"),
    *("--set", "model.drop_path_rate=0.1", "--set", "train.mixup=0.8", "--epochs", "2"),
    *("--set", "train.model_ema_decay=0.9", "--set", "train.warmup_epochs=0"),
    *("--checkpoint-every-steps", "2"),
)
# Points that a run of ten steps in two epochs passes, and how often.
POINTS = {
    "config.json written": 1,
    "config.json renamed": 1,
    ".lock.json renamed": 1,
    "metrics.jsonl line": 12,
    "tensors.safetensors written": 6,
    "tensors.safetensors renamed": 6,
    "values.json written": 6,
    "values.json renamed": 6,
    "checkpoint without its manifest": 6,
    "manifest.json written": 6,
    "manifest.json renamed": 6,
    "checkpoint durable": 6,
    "old manifest removed": 5,
    "old checkpoint removed": 5,
    "model.safetensors written": 2,
    "model.safetensors renamed": 2,
    "row.json written": 1,
    "row.json renamed": 1,
}
UNEQUAL = ("seconds", "started_at", "images_per_second", "git_commit")


def work(folder, kill_at, workers):
    """Trains in a folder, as a process of its own."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if kill_at is not None:
        kill_points.kill_at(kill_at)
    app.main([*COMMAND, "--workers", str(workers)])


def start(folder, kill_at=None, workers=0):
    """Starts the training in a folder, in a fork: the imports are done."""
    process = get_context("fork").Process(target=work, args=(folder, kill_at, workers))
    process.start()
    return process


def outcome(folder):
    """What a finished run left: bytes of weights and metrics, and the row but for times."""
    (directory,) = Path(folder).glob("runs/train/*")
    row = json.loads((directory / "row.json").read_text())
    row = {k: v for k, v in row.items() if not any(part in k for part in UNEQUAL)}
    files = ("model.safetensors", "metrics.jsonl", "ema/model.safetensors")
    kept = [path.name for path in directory.glob("checkpoint-*")]
    return {**{name: (directory / name).read_bytes() for name in files}, "row": row, "kept": kept}


def finish(folder, kill_at=None, seconds=None, workers=0):
    """Runs the training to its end, or kills it; returns whether it was killed on its way."""
    process = start(folder, kill_at, workers)
    process.join(seconds)
    if seconds is not None:
        process.kill()
        process.join()
    assert process.exitcode in (0, -9), (Path(folder) / "output.txt").read_text()
    return process.exitcode == -9


def campaign(kills, seed=0, say=lambda line: None, workers=0):
    """Kills runs so often; returns how many runs were finished and what was lost."""
    draw = random.Random(seed)
    with TemporaryDirectory() as folder:
        before = time.monotonic()
        assert not finish(folder, workers=workers)
        seconds = time.monotonic() - before
        expected = outcome(folder)
    # Every point in turn, at one of the times that it is passed.
    points = [f"{name}:{draw.randint(1, count)}" for name, count in POINTS.items()]
    draw.shuffle(points)
    done, runs, lost = 0, 0, []
    while done < kills:
        with TemporaryDirectory() as folder:
            history = []
            for _ in range(draw.randint(1, 4)):
                if done < kills and points and draw.random() < 0.6:
                    history.append(points.pop())
                    killed = finish(folder, history[-1], workers=workers)
                elif done < kills:
                    after = draw.random() * seconds
                    history.append(f"{after:.2f} s")
                    killed = finish(folder, seconds=after, workers=workers)
                else:
                    break
                done += killed
                if not killed:
                    break
            if not points:
                points = [f"{name}:{draw.randint(1, count)}" for name, count in POINTS.items()]
                draw.shuffle(points)
            finish(folder, workers=workers)
            runs += 1
            found = outcome(folder)
            wrong = [key for key in expected if found[key] != expected[key]]
            if wrong:
                lost.append(f"{', '.join(history)}: {', '.join(wrong)} differ")
            say(f"{done} kills, {runs} runs, {len(lost)} lost; killed at {', '.join(history)}")
    return runs, lost


def main():
    """Reports a campaign, and exits with 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    kills, seed, workers = arguments.kills, arguments.seed, arguments.workers
    runs, lost = campaign(kills, seed, lambda line: print(line, flush=True), workers)
    print(f"{kills} kills, {runs} runs finished, {len(lost)} lost", *lost, sep="\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
