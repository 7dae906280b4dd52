"""A study of six short runs, and commands at it in processes of their own."""

import json
import os
import subprocess
import sys
import time

STUDY = """
[model]
preset = "nano"
embed_dims = [8, 16, 32]
blocks = 1

[train]
epochs = 2
warmup_epochs = 0
batch_size = 240

[grid]
"model.recursions" = [1, 2]
"train.seed" = [0, 1, 2]
"""


def start(folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "sret_cli", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
    )


def ended(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def weights(folder):
    found = sorted(folder.glob("runs/jobs/*/model.safetensors"))
    return {path.parent.name: path.read_bytes() for path in found}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def holders(folder):
    """The processes that hold a run."""
    pids = []
    for path in folder.glob("runs/jobs/*/.lock.json"):
        try:
            pids.append(json.loads(path.read_text())["pid"])
        except (OSError, ValueError):
            continue
    return pids


def trained_one_after_another(folder):
    """Weights of the study's runs, trained one after another in this folder."""
    (folder / "jobs.toml").write_text(STUDY)
    code, _, err = ended(start(folder, "train", "jobs.toml"))
    assert code == 0, err
    return weights(folder)
