"""Several workers at one study: real processes, some of which are killed."""

import json
import os
import signal
import time

import pytest
from jobs import STUDY, ended, holders, start, trained_one_after_another, wait_for, weights

# A worker with this module ends itself as soon as it holds a run of the given number of passes.
POISON = """
import os, sys, threading, time, json, glob, signal
def watch():
    while True:
        for path in glob.glob("runs/jobs/*/.lock.json"):
            try:
                holder = json.load(open(path))
                config = json.load(open(os.path.dirname(path) + "/config.json"))
            except (OSError, ValueError):
                continue
            if holder["pid"] == os.getpid() and config["train"]["seed"] == SEED:
                print("poisoned", flush=True)
                os.kill(os.getpid(), signal.SIGNAL)
        time.sleep(0.005)
if "sret_cli.study.worker" in sys.orig_argv:
    threading.Thread(target=watch, daemon=True).start()
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory):
    """Weights of the study's runs, trained one after another."""
    return trained_one_after_another(tmp_path_factory.mktemp("serial"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "jobs.toml").write_text(STUDY)
    return tmp_path


def test_two_workers_train_bitwise_what_one_process_trains(place, one_after_another):
    code, _, err = ended(start(place, "train", "jobs.toml", "--jobs", 2))
    assert code == 0, err
    assert "2 runs at a time (as asked for), each with 1 threads" in err
    assert weights(place) == one_after_another
    assert not list(place.glob("runs/jobs/*/progress.json"))
    code, _, err = ended(start(place, "train", "jobs.toml", "--jobs", 2))
    assert (code, err.count("already done")) == (0, 6)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(place, one_after_another):
    launcher = start(place, "train", "jobs.toml", "--jobs", 2, "--checkpoint-every-steps", 2)
    first = wait_for(lambda: holders(place))[0]
    os.kill(first, signal.SIGKILL)
    second = wait_for(lambda: [pid for pid in holders(place) if pid != first])[0]
    os.kill(second, signal.SIGSEGV)
    code, _, err = ended(launcher)
    assert code == 0, err
    assert weights(place) == one_after_another


def test_workers_of_a_killed_launcher_save_and_end(place, one_after_another):
    launcher = start(place, "train", "jobs.toml", "--jobs", 2)
    workers = wait_for(lambda: holders(place))
    launcher.kill()
    launcher.communicate()
    began = time.monotonic()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 10)
    assert time.monotonic() - began < 10
    code, _, err = ended(start(place, "train", "jobs.toml", "--jobs", 2))
    assert code == 0, err
    assert weights(place) == one_after_another


def test_an_interrupted_launcher_ends_its_workers_and_says_how_to_go_on(place):
    launcher = start(place, "train", "jobs.toml", "--jobs", 2)
    workers = wait_for(lambda: holders(place))
    launcher.send_signal(signal.SIGINT)
    code, _, err = ended(launcher)
    assert code == 130
    assert "runs finished; run the same command again to resume" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_two_commands_share_a_study_and_both_succeed(place, one_after_another):
    commands = [start(place, "train", "jobs.toml", "--json") for _ in range(2)]
    ends = [ended(command) for command in commands]
    assert [code for code, _, _ in ends] == [0, 0], ends
    first, second = (json.loads(out) for _, out, _ in ends)
    assert first == second
    assert len(first) == 6
    assert weights(place) == one_after_another


def test_runs_that_kill_their_process_are_lost_and_the_others_done(place):
    code = POISON.replace("SEED", "1").replace("SIGNAL", "SIGKILL")
    (place / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    command = ("train", "jobs.toml", "--jobs", 2, "--retries", 1)
    status, _, err = ended(start(place, *command, PYTHONPATH=path))
    assert status == 6, err
    rows = [json.loads(path.read_text()) for path in place.glob("runs/jobs/*/row.json")]
    lost = [row for row in rows if row["status"] == "lost"]
    assert (len(rows), sorted(row["train.seed"] for row in lost)) == (6, [1, 1])
    for row in lost:
        assert row["error"].startswith(
            "its process was ended by signal 9 (SIGKILL), 2 times in all; last lines of worker.log"
        )
        assert "poisoned" in row["error"]
    (place / "sitecustomize.py").unlink()
    assert ended(start(place, "train", "jobs.toml", "--jobs", 2))[0] == 6  # they stay lost
    status, _, err = ended(start(place, "train", "jobs.toml", "--jobs", 2, "--retry", "lost"))
    assert status == 0, err
    assert len(weights(place)) == 6


def test_only_some_runs_are_done_and_the_first_failure_can_end_a_study(place):
    code, out, err = ended(start(place, "train", "jobs.toml", "--only", "seed == 1", "--json"))
    assert code == 0, err
    assert [row["train.seed"] for row in json.loads(out)] == [1, 1]
    study = STUDY.replace("epochs = 2", "epochs = 2\nlr = 1e30\nclip_grad = 1e9")
    study = study.replace("[0, 1, 2]", str(list(range(30))))
    (place / "jobs.toml").write_text(study)
    code, _, err = ended(start(place, "train", "jobs.toml", "--jobs", 2, "--fail-fast"))
    assert code == 6, err
    rows = [json.loads(path.read_text()) for path in place.glob("runs/jobs/*/row.json")]
    assert 1 <= sum(bool(row["error"]) for row in rows) < 60
    code, _, err = ended(start(place, "train", "jobs.toml", "--only", "seed == 99"))
    assert (code, err.splitlines()[-1]) == (2, "sret: none of 60 runs meets 'seed == 99'")
