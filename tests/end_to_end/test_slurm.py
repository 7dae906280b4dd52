"""A study done by a job array of a real Slurm, which the tests start in a folder."""

import os

import pytest
from end_to_end.slurm_cluster import SlurmCluster, missing_daemons
from end_to_end.test_jobs import STUDY as SIX_RUNS
from end_to_end.test_jobs import ended, holders, start, wait_for, weights

STUDY = SIX_RUNS.replace("[0, 1, 2]", "[0, 1]")
ONE = ("--only", "recursions == 2 and seed == 0")
SAVING = ("--checkpoint-every-steps", 2)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := missing_daemons():
        pytest.skip(f"needs {', '.join(missing)} (Debian: apt install slurm-wlm munge)")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory):
    """Weights of the study's runs, trained one after another."""
    folder = tmp_path_factory.mktemp("serial")
    (folder / "jobs.toml").write_text(STUDY)
    code, _, err = ended(start(folder, "train", "jobs.toml"))
    assert code == 0, err
    return weights(folder)


@pytest.fixture
def place(tmp_path, cluster):
    """A folder with the study; its jobs are cancelled at the end."""
    (tmp_path / "jobs.toml").write_text(STUDY)
    yield tmp_path
    cluster.command("scancel", f"--user={os.getuid()}")
    wait_for(lambda: not cluster.command("squeue", "-h"))


@pytest.fixture
def slurm(place, cluster):
    """Runs `sret` with the cluster at hand: slurm("status") -> (exit code, stdout, stderr)."""
    return lambda *words: ended(start(place, *words, **cluster.environment))


def tasks(cluster):
    """The state of each task in the queue."""
    lines = cluster.command("squeue", "-h", "-r", "-o", "%i %T").splitlines()
    return dict(line.split() for line in lines)


def checkpoints(place):
    """The checkpoints of all runs."""
    return set(place.glob("runs/jobs/*/checkpoint-*"))


def test_an_array_trains_bitwise_what_one_process_trains(slurm, place, cluster, one_after_another):
    code, out, err = slurm("train", "jobs.toml", "--engine", "slurm", "--jobs", 2)
    assert (code, out) == (0, "")
    first, second = err.splitlines()
    logs = place / "runs" / "jobs" / "slurm"
    job = first.split()[2].rstrip(":")
    assert first == f"Slurm job {job}: 2 tasks of 60 minutes take 4 runs; logs: {logs}"
    assert second == (
        f"watch it by `sret status jobs.toml --runs runs --watch` or `squeue -j {job}`; "
        f"end it by `scancel {job}`"
    )
    assert not weights(place)  # it returned before a run was done
    assert set(tasks(cluster)) == {f"{job}_0", f"{job}_1"}
    wait_for(lambda: holders(place))
    _, out, _ = slurm("status", "jobs.toml")
    assert out.splitlines()[-1].startswith(f"Slurm job {job}: 2 running on ")
    code, _, err = slurm("train", "jobs.toml", "--engine", "slurm", "--jobs", 1, "--wait")
    assert code == 0, err
    assert "[4/4]" in err
    assert weights(place) == one_after_another
    code, _, err = slurm("train", "jobs.toml", "--engine", "slurm")
    assert (code, err.count("already done")) == (0, 4)
    assert "Slurm job" not in err


def test_a_task_that_is_queued_again_trains_bitwise_the_same_weights(
    slurm, place, cluster, one_after_another
):
    code, _, err = slurm("train", "jobs.toml", "--engine", "slurm", "--jobs", 1, *SAVING)
    assert code == 0, err
    job = err.split()[2].rstrip(":")
    interruptions = (
        ("scontrol", "requeue", job),  # as preemption does
        ("scancel", "--batch", "--signal=USR2", job),  # before the time is up
        ("scancel", "--batch", "--signal=TERM", job),  # before a preemption with a grace time
    )
    seen = set()
    for interruption in interruptions:
        wait_for(lambda seen=seen: holders(place) and checkpoints(place) - seen)
        cluster.command(*interruption)
        wait_for(lambda: tasks(cluster)[job] == "PENDING")
        assert not holders(place)
        assert len(weights(place)) < 4
        _, out, _ = slurm("status", "jobs.toml")
        assert out.splitlines()[-1] == f"Slurm job {job}: 1 pending (BeginTime)"
        seen = checkpoints(place)
        cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: len(weights(place)) == 4)
    assert weights(place) == one_after_another
    assert not list(place.glob("runs/jobs/*/deaths.json"))


def test_a_study_is_started_by_slurm_and_finished_here(slurm, place, cluster, one_after_another):
    code, _, err = slurm("train", "jobs.toml", *ONE, "--engine", "slurm", *SAVING)
    assert code == 0, err
    wait_for(lambda: checkpoints(place))
    cluster.command("scancel", err.split()[2].rstrip(":"))
    wait_for(lambda: not tasks(cluster))  # a cancelled job is not queued again
    assert not holders(place) and not weights(place)
    code, _, err = slurm("train", "jobs.toml", "--jobs", 2)
    assert code == 0, err
    assert weights(place) == one_after_another


def test_several_processes_train_a_run_of_an_array(slurm, place):
    several = (*ONE, "--gpus-per-run", 2, "--device", "cpu")
    code, _, err = slurm("train", "jobs.toml", *several)
    assert code == 0, err
    here = weights(place)
    (place / "runs").rename(place / "before")
    code, _, err = slurm("train", "jobs.toml", "--engine", "slurm", "--wait", *several)
    assert code == 0, err
    assert weights(place) == here


def test_a_job_that_ends_too_early_is_reported_with_its_reason(slurm, place):
    several = (*ONE, "--gpus-per-run", 2)
    code, _, err = slurm("train", "jobs.toml", "--engine", "slurm", "--wait", *several)
    assert code == 6
    last = err.splitlines()[-1]
    assert " has ended, and 1 of 1 runs have no row (" in last
    assert "whose last line is 'sret: --gpus-per-run 2: no CUDA device on this machine" in last


def test_what_slurm_or_sret_refuses_is_one_line(slurm, place):
    def refused(*words):
        code, out, err = slurm("train", "jobs.toml", "--engine", "slurm", *words)
        assert (code, out) == (2, "")
        return err

    assert refused("--slurm", "partition=nope") == (
        "sret: Slurm refuses the job: invalid partition specified: nope; Batch job submission "
        "failed: Invalid partition name specified\n"
    )
    assert refused("--slurm", "time=4:00:00") == (
        "sret: --slurm time=4:00:00: give whole minutes, such as time=240\n"
    )
    assert refused("--slurm", "ntasks=4") == (
        "sret: --slurm ntasks: sret sets it itself; leave it out\n"
    )


def test_a_missing_slurm_or_package_is_one_line(tmp_path):
    (tmp_path / "jobs.toml").write_text(STUDY)
    command = ("train", "jobs.toml", "--engine", "slurm")
    code, _, err = ended(start(tmp_path, *command, PATH=str(tmp_path)))
    assert (code, err) == (
        2,
        "sret: --engine slurm: no sbatch on this machine; run it where Slurm is\n",
    )
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "submitit.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, _, err = ended(start(tmp_path, *command, PATH=str(tmp_path), PYTHONPATH=path))
    assert (code, err) == (
        2,
        "sret: --engine slurm needs submitit; install it by pip install 'sret[slurm]'\n",
    )
