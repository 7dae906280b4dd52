"""What the Ray engine decides without a cluster; tests/end_to_end/test_ray.py starts clusters."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sret_cli.runtime.errors import SretError
from sret_cli.spec.options import RunOptions
from sret_cli.study import ray_cluster, ray_engine
from sret_cli.study.engines import EngineOptions
from sret_cli.study.file import Study, study_from_tables
from sret_cli.study.ray_cluster import Plan, check_address, import_ray, plan_jobs
from sret_cli.study.ray_engine import Worker, probe_file, sees, with_absolute_paths
from sret_cli.study.shares import Share
from sret_cli.study.worker import Work

SMALL, LARGE = {"CPU": 8.0}, {"CPU": 32.0}
GPUS = {"CPU": 16.0, "GPU": 4.0}


def plan(nodes, left=100, device="auto", **options):
    made = plan_jobs(nodes, EngineOptions("ray", **options), device, left)
    return made.jobs, made.cpus, made.gpus


@pytest.mark.parametrize(
    ("nodes", "options", "jobs", "cpus", "gpus"),
    [
        ([SMALL, SMALL], {"jobs": None}, 16, 1, 0),
        (
            [SMALL, SMALL],
            {"jobs": None, "left": 3},
            3,
            4,
            0,
        ),  # two on one of the nodes
        ([SMALL, LARGE], {"jobs": 5}, 5, 8, 0),
        ([SMALL], {"jobs": 20}, 20, 1, 0),  # 8 at a time; the others wait
        ([GPUS, GPUS], {"jobs": None}, 8, 4, 1),
        ([GPUS, LARGE], {"jobs": None}, 4, 4, 1),  # the node without a GPU has no run
        ([GPUS, GPUS], {"jobs": None, "gpus_per_run": 2}, 4, 8, 2),
        ([GPUS, GPUS], {"jobs": None, "runs_per_gpu": 2}, 16, 2, 0.5),
        ([GPUS], {"jobs": None, "device": "cpu"}, 16, 1, 0),
        ([SMALL], {"jobs": None, "device": "cpu", "gpus_per_run": 2}, 4, 2, 0),
    ],
)
def test_runs_fill_a_cluster(nodes, options, jobs, cpus, gpus):
    assert plan(nodes, **options) == (jobs, cpus, gpus)


def test_the_number_of_runs_is_explained():
    assert plan_jobs([GPUS, GPUS], EngineOptions("ray", jobs=None), "auto", 100) == Plan(
        8, 4, 1, "8 GPUs on 2 nodes"
    )
    assert plan_jobs([SMALL], EngineOptions("ray", jobs=9), "cpu", 100) == Plan(
        9, 1, 0, "as asked for; 8 fit at a time"
    )


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([GPUS, GPUS], {"gpus_per_run": 8}, "8: no node of the cluster has 8 GPUs"),
        ([SMALL], {"gpus_per_run": 2}, "no CUDA device .* add --device cpu"),
        ([SMALL], {"gpus_per_run": 9, "device": "cpu"}, "no node of the cluster has 9 CPUs"),
        ([GPUS], {"gpus_per_run": 2, "runs_per_gpu": 2}, "cannot be combined"),
        ([SMALL], {"device": "cuda"}, "--device cuda: no node of the cluster has a GPU"),
    ],
)
def test_what_no_node_has_room_for_is_refused(nodes, options, message):
    with pytest.raises(SretError, match=message):
        plan(nodes, **options)


def test_without_ray_the_pip_command_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SretError, match=r"needs Ray; install it by pip install 'sret\[ray\]'"):
        import_ray()


@pytest.mark.parametrize("address", ["node1", "node1:", ":6379", "ray://node1:10001", "node1:x"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(SretError, match="write it as HOST:PORT, or auto"):
        check_address(address)


def test_a_server_that_is_no_ray_cluster_is_given_up(monkeypatch):
    monkeypatch.setattr(ray_cluster, "ATTACH_SECONDS", 1.0)
    monkeypatch.setattr(ray_cluster, "ATTACH", "import time; time.sleep(60)")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SretError, match=f"{address}: no Ray cluster answers within 1 seconds"):
            check_address(address)


def test_a_cluster_with_a_token_says_how_to_give_it(monkeypatch):
    monkeypatch.setattr(ray_cluster, "ATTACH", "raise SystemExit('RPC error: InvalidAuthToken')")
    with pytest.raises(SretError, match="--address auto: .* export RAY_AUTH_MODE=token"):
        check_address("auto")


def test_a_probe_file_is_seen_where_it_lies_and_then_removed(tmp_path):
    with probe_file(tmp_path / "runs") as probe:
        assert sees(probe)
        assert not sees(tmp_path / "elsewhere" / probe.name)
    assert list((tmp_path / "runs").iterdir()) == []


def test_paths_mean_the_same_on_every_node(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    train = {"dataset": "folder", "data_dir": "images", "teacher": "deit_tiny_patch16_224"}
    tables = {"model": {"preset": "nano", "num_classes": 2}, "train": train}
    study = study_from_tables("paths", tables)
    work = with_absolute_paths(Work(study, Path("runs"), RunOptions()))
    assert work.root == tmp_path / "runs"
    assert work.study.runs[0].train.data_dir == str(tmp_path / "images")
    assert work.study.runs[0].train.teacher == "deit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("gpu_ids", "cpus", "gpus_per_run", "share", "device"),
    [
        ([], 3, 1, Share((), 3, 0), "cpu"),
        ([], 4, 2, Share((), 2, 0, 2), "cpu"),
        ([5], 4, 1, Share(("5",), 1, 3), "cuda"),
        (["GPU-a", "GPU-b"], 8, 2, Share(("GPU-a", "GPU-b"), 1, 3, 2), "cuda"),
    ],
)
def test_an_actor_uses_what_ray_gave_it(
    tmp_path, monkeypatch, gpu_ids, cpus, gpus_per_run, share, device
):
    pools = []

    def pool(work, shares, on_end, on_look, retries):
        pools.append((work.options.device, shares, retries))
        return SimpleNamespace(run=on_look)

    context = SimpleNamespace(get_node_id=lambda: "node-7")
    fake = SimpleNamespace(get_gpu_ids=lambda: gpu_ids, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(ray_engine, "Pool", pool)
    work = Work(Study("none", ()), tmp_path, RunOptions())
    engine = EngineOptions("ray", gpus_per_run=gpus_per_run, retries=4)
    with probe_file(tmp_path) as probe:
        assert Worker().do_runs(work, engine, cpus, probe) is None
        stopped = Worker()
        stopped.stop()
        assert stopped.do_runs(work, engine, cpus, probe) is None
    assert pools == [(device, [share], 4)] * 2
    assert Worker().do_runs(work, engine, cpus, probe) == "node-7"  # the probe file is gone
