import json
import os
from pathlib import Path

import pytest
import torch

from sret_cli.runtime.device import choose_device, device_type
from sret_cli.runtime.errors import SretError

TINY = ("--set", "model.embed_dims=[8, 16, 32]", "--set", "model.blocks=1", "--batch-size", 240)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--mlp-ratio", 3], "of `sret train`; use --set model.mlp_ratio=…"),
        (["train", "--warmup-epochs=0"], "of `sret train`; use --set train.warmup_epochs=…"),
        (["train", "--mlp-ration", 3], "did you mean --set model.mlp_ratio=…?"),
        (["train", "--eopchs", 3], "did you mean --epochs?"),
        (["run", "--epochs", 3], "of `sret run`; use --set train.epochs=…"),
        (["build", "--mlp-ratio", 3], "of `sret build`; use --set model.mlp_ratio=…"),
        (["build", "--lr", 1], "which trains nothing; use it with `sret train`"),
        (["eval", "--mlp-ratio", 3], "--mlp-ratio is not a flag of `sret eval`; see --help"),
        (["data", "check", "--device", "cpu"], "--device is not a flag of `sret data check`"),
        (["train", "--lr", 1, "--lr", 2], "--lr is given twice; leave one of the two out"),
        (["train", "--runs=a", "--runs=b"], "--runs is given twice"),
        (["train", "--lr", 1, "--set", "train.lr=2"], "is the second value of train.lr, after 1.0"),
        (["run", "--set", "train.lr=1", "--set", "train.lr=2"], "the second value of train.lr"),
        (["build", "--slices", 2, "--set", "model.slices=4"], "second value of model.slices"),
        (
            ["convert", "x.pth", "--out", "y", "--slices", 2, "--set", "model.slices=4"],
            "second value of model.slices",
        ),
        (
            ["distill-labels", "--teacher=a", "--out=b", "--set", "train.teacher=c"],
            "train.teacher=c is the second value of train.teacher, after 'a'",
        ),
        (["profile", "--device", "cuda:x"], "unknown device 'cuda:x'; choose auto, cpu, cuda or"),
        (["profile", "--memory", "--device", "tpu"], "unknown device 'tpu'"),
        (["train", "--resume", "x", "--compile"], "leave out compile"),
        (["train", "--resume", "x", "--synthetic"], "leave out synthetic"),
    ],
)
def test_invalid_flags_get_one_line_with_advice(sret, arguments, message):
    code, out, err = sret(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert os.listdir() == []


def test_one_epoch_is_trained_and_a_note_says_that_warm_up_is_shorter(sret):
    code, out, err = sret(
        *("train", "--epochs", 1, "--lr", 1e-3, "--weight-decay", 0.1, *TINY, "--json")
    )
    (row,) = json.loads(out)
    assert (code, row["train.warmup_epochs"]) == (0, 0)
    assert (row["train.lr"], row["train.weight_decay"]) == (1e-3, 0.1)
    assert "sret: warmup_epochs is set to 0 to fit epochs = 1\n" in err


@pytest.mark.slow
def test_a_recipe_is_a_flag_of_train_and_run_takes_settings(sret):
    code, out, err = sret(
        *(
            "train",
            "--recipe",
            "small",
            "--epochs",
            3,
            "--set",
            "train.auto_augment=none",
            "--json",
        ),
        *TINY,
    )
    (row,) = json.loads(out)
    assert (code, row["train.recipe"], row["train.auto_augment"]) == (0, "small", None), err
    settings = [f"train.{s}" for s in ("recipe=small", "epochs=3", "batch_size=240")]
    settings += ["train.auto_augment=none", "model.embed_dims=[8, 16, 32]", "model.blocks=1"]
    code, out, err = sret("run", "--json", *(a for s in settings for a in ("--set", s)))
    assert (code, [row["run_id"]]) == (0, [r["run_id"] for r in json.loads(out)])
    assert "already done" in err


@pytest.mark.parametrize("field", ["init", "soft_labels", "teacher_checkpoint"])
def test_a_missing_path_is_refused_before_anything_is_done(sret, tmp_path, field):
    teacher = ["--set", "train.teacher=resnet18"] if field == "teacher_checkpoint" else []
    code, _, err = sret("train", "--set", f"train.{field}=nowhere", *teacher)
    assert code == (4 if field == "soft_labels" else 5)
    assert err == (
        f"sret: {field} = 'nowhere' does not exist; a relative path is relative to the working "
        f"directory ({tmp_path})\n"
    )
    assert os.listdir() == []


def test_a_tilde_in_a_flag_is_the_home_directory(sret, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sret("build", "--preset", "nano", "--out=~/model")[0] == 0
    assert Path("home/model/config.json").exists()
    code, _, err = sret("eval", "~/model", "--data-dir=~/images")
    assert (code, f"no folder {tmp_path}/home/images" in err) == (4, True)


@pytest.mark.slow
def test_predicted_memory_of_a_study_is_for_its_own_training(sret):
    Path("s.toml").write_text(
        '[model]\npreset = "nano"\n[train]\nbatch_size = 96\naccumulation = 3\n'
        'precision = "bf16"\nrecompute = "pass"\n',
        encoding="utf-8",
    )
    rows = []
    for flags in ((), ("--batch-size", 16, "--precision", "fp32", "--recompute", "none")):
        code, out, _ = sret("profile", "s.toml", "--memory", "--json", *flags)
        (row,) = json.loads(out)
        fields = ("batch_size", "precision", "recompute")
        rows.append([code, *(row[f"memory_{field}"] for field in fields)])
    assert rows == [[0, 32, "bf16", "pass"], [0, 16, "fp32", "none"]]
    code, out, _ = sret("profile", "--preset", "nano", "--memory", "--json")
    (row,) = json.loads(out)
    assert (row["memory_batch_size"], row["memory_precision"]) == (8, "fp32")


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [1]
    assert choose_device("cuda") == torch.device("cuda")
    with pytest.raises(
        SretError, match="no device cuda:7 on this machine; it has cuda:0 to cuda:1"
    ):
        choose_device("cuda:7")
    assert [device_type(name) for name in ("auto", "cpu", "cuda:12")] == ["auto", "cpu", "cuda"]
    for wrong in ("cuda:", "cuda:-1", "cpu:0", "cuda1", "", "cuda:1\n"):
        with pytest.raises(SretError, match="unknown device"):
            device_type(wrong)


def test_distributed_processes_do_not_choose_a_gpu_by_number(monkeypatch):
    from sret_cli.training.ranks import start_ranks

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SretError, match="each of 2 processes takes its own; use --device cuda"):
        start_ranks("cuda:1")


def test_help_lists_flags_in_sections(sret, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = sret("train", "--help")
    sections = [line for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert (code, sections) == (
        0,
        [
            *("Arguments:", "Model:", "Data:", "Training:", "Many runs:", "Where and how:"),
            "Options:",
        ],
    )
    assert out.count("--help") == 1 and out.rindex("Options:") < out.index("--help")
    assert max(map(len, out.splitlines())) <= 80


def test_help_on_studies_is_readable_on_a_narrow_terminal(sret, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = sret("help", "studies")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for words in ("[model] with a backbone", "│ distill_temperature ", "│ 1e-05 "):
        assert words in out


def test_help_lists_its_topics_and_names_the_nearest(sret):
    code, out, _ = sret("help")
    assert code == 0 and "  studies  Every table and key" in out
    assert sret("help", "study") == (
        2,
        "",
        "sret: unknown topic 'study'; did you mean 'studies'?\n",
    )
