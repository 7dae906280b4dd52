import shlex

import pytest
import typer

from sret_cli.commands.app import app
from sret_cli.commands.arguments import study_from
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.resolve import resolve_run
from sret_cli.study.train_command import train_command
from sret_cli.training.config import run_config


def run_of(command):
    """The run that `sret` would train."""
    _, name, *rest = shlex.split(command)
    context = typer.main.get_command(app).commands[name].make_context(name, rest)
    (run,) = study_from(context, trains=True).runs
    return run


def test_the_command_of_a_default_run_has_few_words():
    run = Run("depth", "nano", PRESETS["nano"], TrainSpec())
    assert train_command(run_config(run)) == "sret train --preset nano --num-classes 10"


def test_fields_with_a_flag_use_it_and_others_use_set():
    spec = PRESETS["nano"].with_values(recursions=(4, 4, 4), nll="none")
    run = Run("depth", "nano", spec, TrainSpec(lr=0.003, seed=2, clip_grad=0.0))
    assert train_command(run_config(run)) == (
        "sret train --preset nano --num-classes 10 --lr 0.003 --seed 2 "
        "--set 'model.recursions=[4, 4, 4]' --set model.nll=none --set train.clip_grad=0.0"
    )


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"preset": "nano"}, {}),
        ({"preset": "nano", "layers": 16, "twin": "layers"}, {"epochs": 1, "lr": 3e-3}),
        ({"preset": "nano", "order": [[0], [0, 1, 1], [0]]}, {"opt": "sgd", "min_lr": 1e-7}),
        ({"preset": "sret_t", "img_size": 32}, {"recipe": "sret", "batch_size": 128}),
        ({"preset": "sret_s", "img_size": 64}, {"recipe": "sret", "dataset": "synthetic"}),
        ({"preset": "deep", "drop_path_rate": 0.3}, {"recipe": "deit", "auto_augment": "none"}),
        ({"preset": "nano"}, {"recipe": "small", "lr": 2e-3, "recursions_range": [1, 4]}),
        ({"preset": "nano"}, {"recompute": 3, "compile": "auto", "sched_on_updates": False}),
    ],
)
def test_the_command_trains_the_same_run(model, train):
    run = resolve_run("depth", model, train)
    assert run_of(train_command(run_config(run))).run_id == run.run_id


@pytest.mark.slow  # loads timm
def test_the_command_trains_the_same_timm_model():
    model = {"backbone": "test_vit", "img_size": 32, "timm_args": {"patch_size": 8}, "share": "all"}
    run = resolve_run("depth", model, {"epochs": 2, "recipe": "deit"})
    assert run_of(train_command(run_config(run))).run_id == run.run_id


def test_a_path_with_spaces_and_quotes_is_one_word():
    train = TrainSpec(data_dir="my 'best' data")
    command = train_command(run_config(Run("depth", "nano", PRESETS["nano"], train)))
    words = shlex.split(command)
    assert words[words.index("--data-dir") + 1] == "my 'best' data"


def test_a_run_that_continues_another_resumes_it():
    run = Run("depth", "nano", PRESETS["nano"], TrainSpec(epochs=30), continues="0123456789")
    command = train_command(run_config(run))
    assert command == "sret train --resume runs/depth/0123456789 --epochs=30"


@pytest.mark.parametrize(
    "config",
    [{}, {"model": {}, "train": None}, {"model": {}, "train": {}}, {"train": {"epochs": 1}}],
)
def test_what_is_no_training_has_no_command(config):
    assert train_command(config) is None
