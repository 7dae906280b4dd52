"""A training resumes only with the data, weights and labels that it began with."""

import shutil

import pytest
from helpers import stop_at

from sret_cli.runtime.errors import SretError
from sret_cli.runtime.progress import Progress
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.resolve import continue_run
from sret_cli.training.checkpoint import read_checkpoint
from sret_cli.training.evaluate import EvaluationOptions, evaluate_run
from sret_cli.training.identify import Identifier
from sret_cli.training.session import train


def run_of(tiny, folder, **values):
    """Four steps an epoch, of four images."""
    common = {"dataset": "folder", "data_dir": str(folder), "batch_size": 4, "epochs": 2}
    spec = TrainSpec(**{**common, "warmup_epochs": 0, **values})
    return Run("test", "tiny", tiny.with_values(num_classes=2), spec)


def stopped(run, directory, step=3):
    with pytest.raises(SystemExit):
        train(run, directory, progress=Progress(on_step=stop_at(step)))


def remove_an_image(folder):
    (folder / "train" / "dog" / "7.jpg").unlink()


def change_pixels(folder):
    """Changes the pixels of an image, but not the number of bytes of its file."""
    path = folder / "test" / "dog" / "7.jpg"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def add_an_image(folder):
    shutil.copy(folder / "test" / "dog" / "7.jpg", folder / "test" / "dog" / "8.jpg")


def rename_a_class(folder):
    for split in ("train", "test"):
        (folder / split / "cat").rename(folder / split / "zebra")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_an_image, "images are not those that .* on .train/dog/7.jpg is missing"),
        (
            rename_a_class,
            "different classes: 'cat' is only in the first, 'zebra' is only in the second",
        ),
        (change_pixels, "images are not those that .* on .test/dog/7.jpg has other bytes"),
        (add_an_image, "images are not those that .* on .test/dog has 9 images, not 8"),
    ],
)
def test_a_run_whose_images_have_changed_is_refused_and_nothing_is_lost(
    tiny, folder, tmp_path_factory, change, message
):
    run, directory = run_of(tiny, folder), tmp_path_factory.mktemp("run")
    stopped(run, directory)
    config = (directory / "config.json").read_bytes()
    change(folder)
    with pytest.raises(SretError, match=message) as refused:
        train(run, directory)
    assert refused.value.code == 5
    assert (directory / "config.json").read_bytes() == config
    assert (directory / "checkpoint-3" / "manifest.json").exists()


@pytest.mark.slow
def test_a_run_whose_teacher_has_other_weights_is_refused(tiny, folder, tmp_path_factory):
    teachers, directory = tmp_path_factory.mktemp("teachers"), tmp_path_factory.mktemp("run")
    for seed in (0, 1):
        train(run_of(tiny, folder, epochs=1, seed=seed), teachers / str(seed))
    (teachers / "now").symlink_to("0")
    run = run_of(tiny, folder, teacher=str(teachers / "now"))
    stopped(run, directory)
    (teachers / "now").unlink()
    (teachers / "now").symlink_to("1")
    with pytest.raises(SretError, match="the teacher's weights are not those that .*run"):
        train(run, directory)


def test_a_bad_image_loses_no_step_and_can_then_be_left_out(tiny, folder, tmp_path_factory):
    image = folder / "train" / "dog" / "7.jpg"
    good = image.read_bytes()
    root = tmp_path_factory.mktemp("runs")
    image.write_bytes(good[:200])
    run = Identifier().identify(run_of(tiny, folder))
    directory = run.directory(root)
    with pytest.raises(SretError, match=r"dog/7.jpg.*leave it out by --on-bad-image skip"):
        train(run, directory)
    (kept,) = directory.glob("checkpoint-*")
    assert read_checkpoint(kept)["progress"]["step"] < 4
    skipping = continue_run(directory, None, on_bad_image="skip")
    assert skipping.train.on_bad_image == "skip"
    assert skipping.run_id == run.run_id
    assert train(skipping, directory)["bad_images"] == 1
    image.write_bytes(good)
    with pytest.raises(SretError, match=r"train/dog/7\.jpg has [,\d]+ bytes, not 200"):
        train(skipping, directory)


def test_an_image_that_was_damaged_after_a_stop_is_named_and_can_be_put_back(
    tiny, folder, tmp_path_factory
):
    image, directory = folder / "train" / "dog" / "7.jpg", tmp_path_factory.mktemp("run")
    good, run = image.read_bytes(), run_of(tiny, folder)
    stopped(run, directory)
    image.write_bytes(good[:200])
    with pytest.raises(SretError, match=r"train/dog/7\.jpg has 200 bytes, not [,\d]+"):
        train(run, directory)
    image.write_bytes(good)
    assert train(run, directory)["epochs_trained"] == 2


def test_other_images_can_be_left_out_of_a_batch_that_is_mixed(tiny, folder, tmp_path_factory):
    (folder / "train" / "dog" / "7.jpg").write_bytes(b"no image")
    run = run_of(tiny, folder, mixup=0.8, cutmix=1.0, on_bad_image="skip")
    assert train(run, tmp_path_factory.mktemp("run"))["bad_images"] == 1


def test_averaged_weights_are_evaluated_with_the_recursions_of_the_model(tiny, tmp_path):
    spec = TrainSpec(
        epochs=1, warmup_epochs=0, model_ema_decay=0.5, recursions_range=(1, 4), batch_size=240
    )
    run = Run("test", "tiny", tiny, spec)
    row = train(run, tmp_path)
    averaged = evaluate_run(tmp_path / "ema")
    assert row["ema_test_loss"] == pytest.approx(averaged["test_loss"], rel=1e-6)
    at_four = evaluate_run(tmp_path / "ema", EvaluationOptions(recursions=4))
    assert row["ema_test_loss"] != pytest.approx(at_four["test_loss"], rel=1e-6)
