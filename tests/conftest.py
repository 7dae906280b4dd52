import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sret_cli.cli import main
from sret_cli.spec import ModelSpec

TINY = ModelSpec(
    img_size=16,
    num_classes=10,
    stem_strides=(1, 2, 1),
    embed_dims=(8, 16, 32),
    num_heads=(1, 2, 4),
    blocks=(1, 2, 1),
    slices=(4, 2, 1),
    recursive_slices=(2, 2, 1),
)

UNSLICED = {"slices": 1, "recursive_slices": 1}

# Measured by running the reference implementation under fvcore 0.1.5.post20221221, batch of one.
REFERENCE = [
    ("sret_t", {}, 4_755_979, 1_121_665_792),
    ("sret_t", UNSLICED, 4_755_979, 1_374_904_064),
    ("sret_lt", {}, 4_988_024, 1_173_698_304),
    ("sret_lt", UNSLICED, 4_988_024, 1_426_936_576),
    ("sret_s", {}, 20_899_692, 4_190_973_192),
    ("sret_s", UNSLICED, 20_899_692, 4_689_536_040),
]


def pytest_configure():
    # Two cores; where tests go on in two processes each of these, and what it starts, has one.
    alone = os.environ.get("OMP_NUM_THREADS", 2)
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else int(alone)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def torch_products(model, images):
    """Multiply-adds of the matrix products and convolutions of a model, as torch counts them.

    Attention is computed by its plain matrix products, which every release of torch counts; its
    fused kernel for the CPU is counted as nothing by releases before 2.15.
    """
    counter = FlopCounterMode(display=False)  # two for a multiply-add, and nothing for norms
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() / 2


@pytest.fixture(scope="session")
def tiny():
    return TINY


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
