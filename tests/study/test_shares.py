"""How a machine is divided among workers."""

import pytest

from sret_cli.runtime.errors import SretError
from sret_cli.study import shares
from sret_cli.study.shares import Share, divide, jobs_on_gpus


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(shares, "cores", lambda: 16)


@pytest.mark.parametrize(
    ("jobs", "loaders", "share"),
    [
        (1, None, Share((), 16, 0)),
        (4, None, Share((), 4, 0)),
        (5, None, Share((), 3, 0)),
        (4, 2, Share((), 2, 2)),  # threads and loader processes together are the four cores
        (32, None, Share((), 1, 0)),
        (32, 1, Share((), 1, 1)),
    ],
)
def test_workers_on_a_cpu_have_equal_parts_of_its_cores(jobs, loaders, share):
    assert divide(jobs, "cpu", [], loaders=loaders) == [share] * jobs


def test_each_worker_sees_its_own_gpu():
    gpus = [share.gpus for share in divide(4, "auto", ["0", "1", "2", "3"])]
    assert gpus == [("0",), ("1",), ("2",), ("3",)]
    pairs = [share.gpus for share in divide(2, "cuda", ["4", "5", "6", "7"], gpus_per_run=2)]
    assert pairs == [("4", "5"), ("6", "7")]
    packed = [share.gpus for share in divide(4, "auto", ["0", "1"], runs_per_gpu=2)]
    assert packed == [("0",), ("0",), ("1",), ("1",)]
    more = [share.gpus for share in divide(3, "auto", ["0", "1"])]
    assert more == [("0",), ("1",), ("0",)]


def test_a_workers_environment_keeps_it_within_its_share():
    (share, _) = divide(2, "auto", ["GPU-a", "GPU-b"])
    assert share.environment() == {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "GPU-a",
    }
    assert share.loaders == 7
    assert "CUDA_VISIBLE_DEVICES" not in divide(2, "cpu", [])[0].environment()


def test_auto_is_one_run_a_gpu():
    assert jobs_on_gpus(["0", "1", "2", "3"]) == 4
    assert jobs_on_gpus(["0", "1", "2", "3"], gpus_per_run=2) == 2
    assert jobs_on_gpus(["0", "1"], runs_per_gpu=3) == 6


@pytest.mark.parametrize(
    ("device", "gpus", "values", "message"),
    [
        ("auto", [], {"gpus_per_run": 2}, "no CUDA device on this machine; leave it out"),
        ("auto", ["0"], {"gpus_per_run": 2}, "1 GPUs are visible"),
        ("auto", ["0"], {"gpus_per_run": 2, "runs_per_gpu": 2}, "cannot be combined"),
    ],
)
def test_too_few_gpus_are_refused(device, gpus, values, message):
    with pytest.raises(SretError, match=message):
        divide(1, device, gpus, **values)


def test_several_processes_of_a_run_share_the_cores():
    assert divide(2, "cpu", [], gpus_per_run=2) == [Share((), 4, 0, 2)] * 2
