"""A study on Ray: its own cluster, and clusters of two nodes on this machine, one of which dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from jobs import STUDY, ended, holders, start, trained_one_after_another, wait_for, weights

pytest.importorskip("ray", reason="needs ray", exc_type=ImportError)
pytestmark = pytest.mark.slow
CLOSED = "127.0.0.1:1"
NODE = ("ray", "start", "--block", "--disable-usage-stats", "--object-store-memory", "100000000")
# Hides a directory from the command that follows, as on a machine that does not mount it.
HIDE = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"')
SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex, "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def family(pid):
    """A process and its descendants."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended meanwhile
            found += [each for child in children.read_text().split() for each in family(int(child))]
    return [pid, *found]


class Cluster:
    """Nodes of one CPU each on this machine, started as a user starts them."""

    def __init__(self, folder):
        self.folder, self.address, self.nodes = folder, f"127.0.0.1:{free_port()}", []
        self.add("--head", "--port", self.address.partition(":")[2], "--include-dashboard=false")

    def add(self, *arguments, before=()):
        """Starts a node and waits until Ray says that it runs."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        bin_folder = os.path.dirname(sys.executable)
        environment = os.environ | SETTINGS
        environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
        where = () if "--head" in arguments else ("--address", self.address)
        with open(log, "w") as out:
            node = subprocess.Popen(
                [*before, *NODE, "--num-cpus", "1", *where, *arguments],
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )
        self.nodes.append(node)
        wait_for(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None)
        assert node.poll() is None, log.read_text()
        return node

    def kill(self, node):
        """Ends a node with everything that runs on it, all at once."""
        for pid in family(node.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()
        self.nodes.remove(node)

    def train(self, place, *arguments, **environment):
        """Starts a training on this cluster."""
        command = ("train", "jobs.toml", "--engine", "ray", "--address", self.address)
        return start(place, *command, *arguments, **SETTINGS, **environment)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    found = Cluster(tmp_path_factory.mktemp("cluster"))
    yield found
    for node in list(found.nodes):
        found.kill(node)


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory):
    """Weights of the study's runs, trained one after another."""
    return trained_one_after_another(tmp_path_factory.mktemp("serial"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "jobs.toml").write_text(STUDY)
    return tmp_path


def test_a_killed_node_loses_no_run_and_repeats_none(cluster, place, one_after_another):
    second = cluster.add()
    launcher = cluster.train(place, "--jobs", "auto", "--checkpoint-every-steps", 2)
    wait_for(lambda: list(place.glob("runs/jobs/*/row.json")))
    wait_for(lambda: set(holders(place)) & set(family(second.pid)))
    cluster.kill(second)
    done = len(list(place.glob("runs/jobs/*/row.json")))
    code, _, err = ended(launcher)
    assert code == 0, err
    assert 1 <= done < 6
    assert "2 runs at a time (2 CPUs on 2 nodes), each with 1 CPUs" in err
    assert [line[:5] for line in err.splitlines() if "top-1" in line] == [
        f"[{number}/6]" for number in range(1, 7)
    ]
    assert weights(place) == one_after_another
    assert not list(place.glob("runs/.probe-*"))


def test_a_node_that_does_not_see_the_runs_is_named_and_not_used(cluster, place):
    runs = place / "runs"
    runs.mkdir()
    if subprocess.run([*HIDE, runs, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a directory (unshare -Urm)")
    blind = cluster.add(before=(*HIDE, str(runs)))
    try:
        code, _, err = ended(cluster.train(place, "--jobs", "auto", "--only", "seed == 0"))
    finally:
        cluster.kill(blind)
    assert code == 0, err
    assert f"is not used: it does not see {runs}" in err
    assert "1 runs at a time (1 CPUs on 1 nodes), each with 1 CPUs" in err
    assert len(weights(place)) == 2


def test_a_study_goes_on_from_engine_to_engine(cluster, place, one_after_another):
    command = ("train", "jobs.toml", "--only", "model.recursions == 2")
    here = start(place, *command, "--jobs", 2)
    wait_for(lambda: list(place.glob("runs/jobs/*/metrics.jsonl")))
    here.send_signal(signal.SIGINT)
    assert ended(here)[0] == 130
    done = len(list(place.glob("runs/jobs/*/row.json")))
    on_ray = cluster.train(place, *command[2:])
    wait_for(lambda: len(list(place.glob("runs/jobs/*/row.json"))) > done)
    workers = wait_for(lambda: holders(place))
    on_ray.send_signal(signal.SIGTERM)
    code, _, err = ended(on_ray)
    assert code == 143, err
    assert "runs finished; run the same command again to resume" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert not list(place.glob("runs/.probe-*"))
    assert all(node.poll() is None for node in cluster.nodes)  # the cluster goes on
    code, _, err = ended(start(place, *command))
    assert code == 0, err
    assert len(weights(place)) == 3
    assert weights(place).items() <= one_after_another.items()


def test_without_an_address_a_cluster_of_this_machine_trains_the_same(place, one_after_another):
    command = ("train", "jobs.toml", "--engine", "ray", "--jobs", 2)
    code, out, err = ended(start(place, *command, "--json", HOME=str(place)))
    assert code == 0, err
    assert len(json.loads(out)) == 6
    assert err.startswith("2 runs at a time (as asked for), each with ")
    assert len(err.splitlines()) == 7  # Ray itself says nothing
    assert weights(place) == one_after_another


def test_an_address_that_does_not_answer_is_one_line(place):
    code, _, err = ended(start(place, "train", "jobs.toml", "--engine", "ray", "--address", CLOSED))
    assert (code, err) == (2, f"sret: --address {CLOSED}: no answer (Connection refused)\n")
