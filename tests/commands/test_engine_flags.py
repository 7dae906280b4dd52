"""Flags about many runs, the user's defaults for them, and what is refused."""

import re

import pytest

STUDY = """
[model]
preset = "nano"
[train]
epochs = 1
warmup_epochs = 0
[grid]
"train.seed" = [0, 1]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SRET_CONFIG", raising=False)
    (tmp_path / "config" / "sret").mkdir(parents=True)
    (tmp_path / "few.toml").write_text(STUDY)
    return tmp_path


@pytest.fixture
def options(monkeypatch):
    """The options of engines that a command asked for; nothing is trained."""
    from sret_cli.study.work import Outcome

    seen = []

    def do_study(study, root, run_options, engine, console, trains=True):
        seen.append((engine, run_options, study))
        return Outcome()

    monkeypatch.setattr("sret_cli.study.engines.do_study", do_study)
    return seen


def test_a_users_defaults_are_taken_where_a_flag_is_not_given(sret, place, options):
    (place / "config" / "sret" / "config.toml").write_text(
        'jobs = 4\nretries = 5\naddress = "head:6379"\nslurm = { partition = "gpu", time = 240 }\n'
    )
    sret("train", "few.toml", "--retries", 1)
    engine = options[0][0]
    assert (engine.engine, engine.jobs, engine.retries) == ("local", 4, 1)
    assert engine.address == "head:6379"
    assert engine.slurm == (("partition", "gpu"), ("time", "240"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job = 4\n", "no key 'job'; did you mean 'jobs'"),
        ('retries = "many"\n', "retries = 'many': give a value of type int"),
        ("jobs = [\n", "is not TOML"),
    ],
)
def test_wrong_defaults_are_one_line(sret, place, options, text, message):
    (place / "config" / "sret" / "config.toml").write_text(text)
    code, _, err = sret("train", "few.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert options == []


def test_a_named_file_of_defaults_has_to_exist(sret, place, options, monkeypatch):
    monkeypatch.setenv("SRET_CONFIG", str(place / "none.toml"))
    code, _, err = sret("train", "few.toml")
    assert code == 2
    assert "which does not exist" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--jobs", "many"), "--jobs many: give a number of runs at a time, or auto"),
        (("--jobs", "0"), "--jobs 0: give a number"),
        (("--engine", "slrum"), "--engine slrum: did you mean 'slurm'"),
        (("--slurm", "gpu"), "--slurm gpu: write it as partition=gpu,time=240"),
        (("--retry", "all"), "--retry all: choose failed or lost"),
        (("--only", "seed = 1"), "'seed = 1' is not a condition"),
        (("--max-runs", "1"), "has 2 runs; if you want them, give --max-runs 2"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(sret, place, options, flags, message):
    code, _, err = sret("train", "few.toml", *flags)
    assert (code, err.count("\n")) in ((2, 1), (3, 1))
    assert message in err
    assert options == []


def test_only_chooses_runs_before_anything_starts(sret, place, options):
    sret("train", "few.toml", "--only", "seed == 1", "--fail-fast", "--retry", "failed,lost")
    engine, run_options, study = options[0]
    assert [run.train.seed for run in study.runs] == [1]
    assert (run_options.fail_fast, run_options.retry) == (True, ("failed", "lost"))
    assert engine.is_this_process


@pytest.mark.slow
def test_a_dry_run_lists_runs_with_costs_and_times_and_starts_none(sret, place):
    code, out, err = sret("train", "few.toml", "--dry-run", "--jobs", 2)
    assert code == 0, err
    lines = [line for line in out.splitlines() if "waiting" in line]
    assert len(lines) == 2
    assert all("0.33" in line and re.search(r"0:\d\d:\d\d", line) for line in lines)
    assert re.search(r"2 of 2 runs are left: about 0:\d\d:\d\d with 2 at a time", out)
    assert not (place / "runs").exists()
