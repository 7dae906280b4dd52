"""Many tiny runs by several workers: rows a minute, poisoned runs, and random kills.

    python tests/benchmarks/many_runs.py rows [--runs 120]
    python tests/benchmarks/many_runs.py poison [--runs 300]
    python tests/benchmarks/many_runs.py kills [--kills 20]
    python tests/benchmarks/many_runs.py quickstart

`rows` profiles runs, which only write a row. `poison` trains runs of which ten fail: four diverge,
three have a model that cannot be built, three kill their process. `kills` ends random workers and
launchers of a study of 40 runs at random times, and compares all weights with those of the
undisturbed study. `quickstart` compares the shipped study one after another and with `--jobs auto`.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = """
[model]
preset = "nano"
embed_dims = [8, 16, 32]
blocks = 1
[train]
epochs = 1
warmup_epochs = 0
batch_size = 480
"""
KILLER = """
import glob, json, os, signal, sys, threading, time
def watch():
    while True:
        for path in glob.glob("runs/many/*/.lock.json"):
            try:
                holder = json.load(open(path))
                config = json.load(open(os.path.dirname(path) + "/config.json"))
            except (OSError, ValueError):
                continue
            if holder["pid"] == os.getpid() and config["name"] == "kills":
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.005)
if "sret_cli.study.worker" in sys.orig_argv:
    threading.Thread(target=watch, daemon=True).start()
"""


def command(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Starts `sret` in a folder."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, "-m", "sret_cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def finished(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code of a command, and the end of what it printed."""
    out, _ = process.communicate()
    return process.returncode, "\n".join(out.splitlines()[-3:])


def rows_of(folder: Path) -> list[dict[str, object]]:
    """The rows of a study."""
    return [json.loads(path.read_text()) for path in folder.glob("runs/many/*/row.json")]


def weights_of(folder: Path) -> dict[str, bytes]:
    """The weights of the runs of a study."""
    found = folder.glob("runs/many/*/model.safetensors")
    return {path.parent.name: path.read_bytes() for path in found}


def measure_rows(folder: Path, runs: int) -> None:
    """Prints how many rows a minute two workers write that only profile."""
    ratios = list(range(runs))
    widths = f'[grid]\n"model.num_classes" = {[10 + ratio for ratio in ratios]}\n'
    (folder / "many.toml").write_text(TINY.split("[train]")[0] + widths)
    start = time.perf_counter()
    code, end = finished(command(folder, "profile", "many.toml", "--jobs", "2"))
    minutes = (time.perf_counter() - start) / 60
    count = len(rows_of(folder))
    print(f"{count} rows, exit {code}, {count / minutes:.0f} a minute, start included")
    assert count == runs, end


def measure_poison(folder: Path, runs: int) -> None:
    """Prints what becomes of a study ten of whose runs are poisoned."""
    listed = [f'[[runs]]\nname = "fine"\n"train.seed" = {seed}\n' for seed in range(runs - 10)]
    listed += [
        f'[[runs]]\nname = "diverges"\n"train.lr" = 1e30\n"train.clip_grad" = 1e9\n'
        f'"train.seed" = {seed}\n'
        for seed in range(4)
    ]
    listed += [
        f'[[runs]]\nname = "cannot be built"\n"model.backbone" = "no_such_model_{number}"\n'
        for number in range(3)
    ]
    listed += [f'[[runs]]\nname = "kills"\n"train.seed" = {1000 + k}\n' for k in range(3)]
    train = TINY.partition("[train]")[2]
    model = '"model.preset" = "nano"\n"model.embed_dims" = [8, 16, 32]\n"model.blocks" = 1\n'
    text = "".join(entry if "backbone" in entry else entry + model for entry in listed)
    (folder / "many.toml").write_text(f"[train]{train}{text}")
    (folder / "sitecustomize.py").write_text(KILLER)
    start = time.perf_counter()
    code, end = finished(command(folder, "train", "many.toml", "--jobs", "2", "--retries", "1"))
    seconds = time.perf_counter() - start
    rows = rows_of(folder)
    done = [row for row in rows if not row["error"]]
    print(f"{runs} runs in {seconds:.0f} s: {len(done)} rows done, exit {code}; {end}")
    for row in rows:
        if row["error"]:
            print(f"  {row['name']}: {row['status']}: {str(row['error'])[:90]}")


def measure_kills(folder: Path, kills: int) -> None:
    """Prints whether a study of 40 runs survives random kills, bitwise."""
    grid = f'[grid]\n"model.recursions" = [1, 2]\n"train.seed" = {list(range(20))}\n'
    calm, wild = folder / "calm", folder / "wild"
    for place in (calm, wild):
        place.mkdir()
        (place / "many.toml").write_text(TINY.replace("epochs = 1", "epochs = 2") + grid)
    arguments = ("train", "many.toml", "--jobs", "2", "--checkpoint-every-steps", "2")
    code, end = finished(command(calm, *arguments))
    assert code == 0, end
    generator, launched, killed = random.Random(0), 1, {"worker": 0, "launcher": 0}
    launcher = command(wild, *arguments)
    while killed["worker"] + killed["launcher"] < kills:
        time.sleep(generator.uniform(0.5, 4.0))
        if launcher.poll() is not None:
            launcher, launched = command(wild, *arguments, "--retry", "lost"), launched + 1
            continue
        listed = subprocess.run(
            ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True
        ).stdout.split()
        if not listed or generator.random() < 0.25:
            victim, kind = launcher.pid, "launcher"
        else:
            victim, kind = int(generator.choice(listed)), "worker"
        os.kill(victim, signal.SIGKILL)
        killed[kind] += 1
    launcher.wait()
    code, end = finished(command(wild, *arguments, "--retry", "lost"))
    expected, found = weights_of(calm), weights_of(wild)
    same = sum(found.get(run) == weights for run, weights in expected.items())
    rows = len(rows_of(wild))
    print(
        f"{killed['worker']} workers and {killed['launcher']} launchers killed in {launched} "
        f"launches: exit {code}, {rows} rows, weights of {same} of {len(expected)} runs bitwise "
        "those of the undisturbed study"
    )


def measure_quickstart(folder: Path) -> None:
    """Prints the time of the shipped study with `--jobs auto` over one after another."""
    times: dict[str, list[float]] = {"1": [], "auto": []}
    for number in range(2):
        for jobs in times:
            start = time.perf_counter()
            study = str(ROOT / "studies" / "quickstart.toml")
            runs = str(folder / f"{jobs}-{number}")
            environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
            subprocess.run(
                [sys.executable, "-m", "sret_cli", "run", study, "--runs", runs, "--jobs", jobs],
                cwd=folder,
                check=True,
                capture_output=True,
                env={**environment, "PYTHONPATH": str(ROOT)},
            )
            times[jobs].append(time.perf_counter() - start)
    one, auto = (statistics.median(times[jobs]) for jobs in ("1", "auto"))
    print(f"one after another {one:.0f} s, --jobs auto {auto:.0f} s: {auto / one:.2f}")


def main() -> None:
    """Runs one of the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("rows", "poison", "kills", "quickstart"))
    parser.add_argument("--runs", type=int)
    parser.add_argument("--kills", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "rows":
            measure_rows(folder, given.runs or 120)
        elif given.what == "poison":
            measure_poison(folder, given.runs or 300)
        elif given.what == "kills":
            measure_kills(folder, given.kills)
        else:
            measure_quickstart(folder)


if __name__ == "__main__":
    main()
