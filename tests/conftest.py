import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import QUICK, TINY
from PIL import Image

from sret_cli.commands.app import main
from sret_cli.runtime.errors import show_note_once


def pytest_configure():
    # Two cores; where tests go on in two processes each of these, and what it starts, has one.
    alone = os.environ.get("OMP_NUM_THREADS", 2)
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else int(alone)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    return TINY


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """The directory `runs` after one quick training; copy it before you change it."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "sret_cli", *map(str, QUICK)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "runs"


@pytest.fixture
def folder(tmp_path):
    """Eight 20x24 JPEG images in each of two classes, in train/ and test/."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.jpg")
    return tmp_path


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    """Where parquet files are to be, beside a cache of their own and offline."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    return tmp_path / "parquet"


@pytest.fixture
def sret(capsys, monkeypatch, tmp_path):
    """Runs `sret` in an empty folder: sret("build", "--json") -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")

    terminate = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sret", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        signal.signal(signal.SIGTERM, terminate)  # `main` sets its own
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture(autouse=True)
def notes_of_each_test():
    """Lets every test see notes that are shown once per process."""
    show_note_once.cache_clear()
