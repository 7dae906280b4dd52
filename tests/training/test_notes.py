import pytest

from sret_cli.data.prepare import load_data
from sret_cli.runtime.errors import show_note_once
from sret_cli.spec.train import TrainSpec
from sret_cli.training.notes import training_notes

BATCH = "batch_size = 64 is never full: there are 16 training images, so each step takes 16"
REPEATS = (
    "aug_repeats = 3: each epoch takes 6 of the 16 images, 3 times each, and leaves out the other "
    "10; they are drawn again in each epoch"
)
AVERAGE = (
    "model_ema_decay = 0.99996: after all 2 steps the averaged weights are still 99.99 % "
    "initial weights; use 0.1 or less, or set train.model_ema_warmup=true"
)


def notes_of(tiny, folder, **values):
    spec = TrainSpec(**{"data_dir": str(folder), "warmup_epochs": 0, "epochs": 2, **values})
    return training_notes(spec, load_data(spec, tiny.with_values(num_classes=2))[0])


def test_a_training_on_few_images_notes_once_what_its_recipe_does_to_them(sret, folder, tmp_path):
    show_note_once.cache_clear()
    arguments = (
        *("train", "--preset", "nano", "--set", "model.embed_dims=[8, 16, 32]", "--workers", "0"),
        *("--data-dir", folder, "--set", "train.recipe=deit", "--epochs", "2", "--device", "cpu"),
        *("--set", "train.warmup_epochs=0", "--batch-size", "64", "--runs", tmp_path / "runs"),
    )
    code, _, err = sret(*arguments)
    assert code == 0
    for line in (f"{BATCH}, but lr = 6.25e-05 is for 64; use a batch_size of 16 or less", REPEATS):
        assert err.count(line) == 1
    assert err.count(AVERAGE) == 1
    assert sret(*arguments, "--set", "train.seed=1")[2].count("aug_repeats") == 0


def test_a_training_without_surprises_has_no_notes(tiny, folder):
    assert notes_of(tiny, folder, batch_size=8) == []
    assert notes_of(tiny, folder, batch_size=16, aug_repeats=1, model_ema_decay=0.05) == []
    warm = {"model_ema_decay": 0.99996, "model_ema_warmup": True}
    assert notes_of(tiny, folder, batch_size=16, **warm) == []


@pytest.mark.parametrize(("repeats", "taken", "rest"), [(2, 8, 8), (3, 6, 10), (16, 1, 15)])
def test_images_that_repeats_leave_out_are_counted(tiny, folder, repeats, taken, rest):
    (line,) = notes_of(tiny, folder, batch_size=8, aug_repeats=repeats)
    assert f"takes {taken} of the 16 images, {repeats} times each, and leaves out the other" in line
    assert f"the other {rest};" in line


def test_the_fraction_of_initial_weights_is_that_after_all_steps(tiny, folder):
    (line,) = notes_of(tiny, folder, batch_size=8, epochs=20, model_ema_decay=0.99996)
    assert "after all 40 steps the averaged weights are still 99.84 % initial weights" in line
    assert "use 0.89125 or less" in line
    assert notes_of(tiny, folder, batch_size=8, epochs=20, model_ema_decay=0.89125) == []
    assert len(notes_of(tiny, folder, batch_size=8, epochs=20, model_ema_decay=0.8913)) == 1
