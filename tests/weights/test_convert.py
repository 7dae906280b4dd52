"""`sret convert` and `sret eval` on what it writes, as a user types them."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from helpers import HEADS, assert_same, filled, saved, small
from PIL import Image

from sret_cli.data.sources import test_folder as read_test_folder
from sret_cli.runtime.errors import SretError
from sret_cli.spec.options import RunOptions
from sret_cli.training.evaluate import Evaluation, EvaluationOptions, evaluate_run
from sret_cli.weights.store import load_model, save_model


@pytest.fixture
def checkpoint(tmp_path):
    """A reference checkpoint of three classes, and the model that is in it."""
    model = filled(small(num_classes=3, slices=1, recursive_slices=(2, 1, 1)))
    return saved(model, tmp_path / "reference.pth"), model


@pytest.fixture
def images(tmp_path):
    """Four JPEG images in each of three classes, in ImageNet's layout but without train/."""
    generator = np.random.default_rng(0)
    for name in ("n01", "n02", "n03"):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (90, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "val" / name / f"{number}.jpeg")
    return tmp_path / "images"


def converted(model, tmp_path):
    save_model(model, tmp_path / "converted", {"name": "small"})
    return tmp_path / "converted"


def test_a_checkpoint_is_converted_and_written_back_bitwise(sret, checkpoint):
    path, model = checkpoint
    code, out, err = sret("convert", path, "--out", "ours", *HEADS, "--json")
    assert code == 0
    assert err.splitlines() == [
        "recognised no preset from the shapes, which do not depend on slices: took slices 1-1-1, "
        "then 1-1-1 (set others by --slices or --preset)",
        "wrote ours/config.json and ours/model.safetensors",
    ]
    assert sorted(os.listdir("ours")) == ["config.json", "model.safetensors"]
    config = json.loads(open("ours/config.json").read())
    assert config["source"]["file"] == "reference.pth"
    assert len(config["source"]["sha256"]) == 64
    assert json.loads(out)[0]["model.embed_dims"] == [8, 16, 32]
    assert_same(load_model(path.parent / "ours"), model)
    code, out, err = sret("convert", "ours", "--to-reference", "--out", "back")
    assert (code, err) == (0, "wrote back/model.pth\n")
    first, back = (torch.load(p, weights_only=True)["model"] for p in (path, "back/model.pth"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[key], back[key]) for key in first)


def test_a_converted_model_gets_another_size_and_a_fresh_head(sret, checkpoint):
    options = ("--img-size", 96, "--reset-head", "--num-classes", 7, "--slices", 2, *HEADS)
    for out in ("a", "b"):
        code, _, err = sret("convert", checkpoint[0], "--out", out, *options)
        assert code == 0
    assert "resampled position embeddings from 8x8 to 12x12\nfresh head for 7 classes\n" in err
    spec = load_model(checkpoint[0].parent / "a").spec
    assert (spec.img_size, spec.num_classes, spec.slices) == (96, 7, (2, 2, 1))
    assert open("a/model.safetensors", "rb").read() == open("b/model.safetensors", "rb").read()


def test_keys_that_differ_are_a_table_over_the_one_line(sret, checkpoint):
    path, _ = checkpoint
    whole = torch.load(path, weights_only=True)
    del whole["model"]["norm.bias"]
    torch.save({**whole["model"], "dist_token": torch.zeros(1, 1, 32)}, path)
    code, out, err = sret("convert", path, "--out", "ours", *HEADS)
    assert (code, out) == (5, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in err.splitlines()]
    assert ["norm.bias", "missing", "–", "(32,)"] in cells
    assert ["dist_token", "unexpected", "(1, 1, 32)", "–"] in cells
    assert err.splitlines()[-1].startswith(f"sret: {path} is of another model: 2 tensors differ")
    assert not os.path.exists("ours")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["reference.pth", "--out", "x"], 5, "no preset has these shapes"),
        (["none.pth", "--out", "x"], 5, "cannot read none.pth"),
        (["reference.pth", "--out", "x", "--preset", "sret_x"], 3, "unknown preset 'sret_x'"),
        (["reference.pth", "--out", "x", *HEADS, "--num-classes", 5], 5, "--reset-head"),
        (["reference.pth", "--out", "x", *HEADS, "--slices", 3], 3, "3 slices divide no stage"),
        (["reference.pth", "--out", "x", "--set", "train.lr=1"], 3, "nothing is trained here"),
        (["evil.pth", "--out", "x"], 5, "its pickle would call posix.system"),
        (["reference.pth", "--out", "x", "--to-reference"], 5, "has no config.json"),
        (["y", "--out", "x", "--to-reference", "--img-size", 32], 2, "leave out the rest"),
        (["reference.pth", "--out", "reference.pth/x", *HEADS], 2, "cannot write"),
        (["reference.pth"], 2, "Missing option '--out'"),
    ],
)
def test_what_cannot_be_converted_leaves_nothing_behind(sret, checkpoint, arguments, code, message):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch executed",)

    torch.save({"model": Evil()}, "evil.pth")
    ended, out, err = sret("convert", *arguments)
    assert (ended, out) == (code, "")
    assert message in err
    assert err.splitlines()[-1].startswith("sret: ")
    assert "Traceback" not in err
    assert sorted(os.listdir()) == ["evil.pth", "reference.pth"]


def test_a_converted_model_is_evaluated_on_a_folder_without_training_images(sret, images, tmp_path):
    directory = converted(filled(small(num_classes=3)), tmp_path)
    code, first, err = sret("eval", directory, "--data-dir", images, "--json", "--workers", 0)
    assert code == 0
    (row,) = json.loads(first)
    assert row["test_images"] == 12
    assert row["top5_percent"] == 100.0
    assert [entry["class"] for entry in row["per_class"]] == ["n01", "n02", "n03"]
    assert [entry["test_images"] for entry in row["per_class"]] == [4, 4, 4]
    mean = sum(entry["top1_percent"] for entry in row["per_class"]) / 3
    assert row["top1_percent"] == pytest.approx(mean)
    code, again, _ = sret("eval", directory, "--data-dir", images, "--json", "--workers", 0)
    assert again == first
    code, out, _ = sret("eval", directory, "--data-dir", images, "--per-class", "--workers", 0)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert [line[:2] for line in cells if line[:1] == ["n02"]] == [["n02", "4"]]


def evaluated(directory, images, **options):
    return evaluate_run(
        directory,
        EvaluationOptions(data_dir=str(images), **options),
        options=RunOptions(device="cpu", workers=0),
    )


def test_the_references_shuffle_depends_on_its_seed_alone(images, tmp_path):
    directory = converted(filled(small(num_classes=3)), tmp_path)
    losses = [
        evaluated(directory, images, reference_shuffle=seed)["test_loss"] for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert evaluated(directory, images)["test_loss"] not in losses


def test_a_model_is_evaluated_at_another_image_size(images, tmp_path):
    directory = converted(filled(small(num_classes=3)), tmp_path)
    at64 = evaluated(directory, images)
    assert evaluated(directory, images, changes={"img_size": 64}) == at64
    at96 = evaluated(directory, images, changes={"img_size": 96, "slices": 4})
    assert at96["params"] == at64["params"] + 8 * (12**2 - 8**2)
    assert at96["test_loss"] != at64["test_loss"]
    with pytest.raises(SretError, match="8 slices .* do not divide 100 tokens.*use 4, 5, 10"):
        evaluated(directory, images, changes={"img_size": 80})


def test_images_are_resized_and_cropped_as_imagenets_are(images):
    from sret_cli.data.prepare import load_test_data
    from sret_cli.spec.presets import PRESETS
    from sret_cli.spec.train import TrainSpec

    train = TrainSpec(dataset="folder", data_dir=str(images))
    loader, _ = load_test_data(train, PRESETS["sret_t"])
    steps = loader.samples.transform.steps.transforms
    assert [type(step).__name__ for step in steps] == ["Resize", "CenterCrop", "MaybePILToTensor"]
    assert (steps[0].size, steps[0].interpolation.value) == (256, "bicubic")
    assert steps[1].size == (224, 224)
    # (0 - 0.485) / 0.229, (0 - 0.456) / 0.224 and (0 - 0.406) / 0.225
    black = loader.normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(black, torch.tensor([-2.117904, -2.035714, -1.804444]))


def test_classes_have_to_be_as_many_as_the_models(images, tmp_path):
    directory = converted(filled(small(num_classes=5)), tmp_path)
    with pytest.raises(SretError, match="have 3 classes, and the model has 5") as refused:
        evaluated(directory, images)
    assert refused.value.code == 4
    for name in ("n00", "n04"):
        (images / "val" / name).mkdir()
    row = evaluated(directory, images)
    assert [entry["class"] for entry in row["per_class"]] == ["n01", "n02", "n03"]


def test_a_converted_model_has_no_test_images_of_its_own(sret, tmp_path):
    directory = converted(filled(small()), tmp_path)
    code, _, err = sret("eval", directory)
    assert (code, err) == (
        4,
        f"sret: {directory} was not trained here; give a folder with val/ by --data-dir\n",
    )


def test_classes_of_test_images_are_those_of_train_where_there_is_one(images):
    assert read_test_folder(images).classes == ("n01", "n02", "n03")
    for name in ("n00", "n01", "n02", "n03"):
        (images / "train" / name).mkdir(parents=True)
    source = read_test_folder(images)
    assert source.classes == ("n00", "n01", "n02", "n03")
    assert source.images.targets == [1] * 4 + [2] * 4 + [3] * 4
    (images / "val" / "n99").mkdir()
    with pytest.raises(SretError, match="has the class 'n99', which train/ does not have"):
        read_test_folder(images)


def test_per_class_tables_say_what_they_are_of_and_go_to_a_file(sret, images, tmp_path):
    directory = converted(filled(small(num_classes=3, nll="per_block")), tmp_path)
    options = ("--data-dir", images, "--workers", 0, "--recursions", "1,2")
    code, out, err = sret("eval", directory, *options, "--per-class", "--out", "new/classes.csv")
    assert code == 0
    assert "wrote new/classes.csv" in err
    titles = [line.strip() for line in out.splitlines() if "recursions" in line]
    assert titles == ["small, recursions 1, layers 3", "small, recursions 2, layers 6"]
    code, out, _ = sret("eval", directory, *options, "--json", "--out", "new/classes.csv")
    rows = json.loads(out)
    with open("new/classes.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert list(lines[0]) == [
        *("run_id", "averaged", "recursions", "layers", "class", "test_images", "top1_percent"),
    ]
    assert [(line["recursions"], line["class"]) for line in lines] == [
        *(("1", "n01"), ("1", "n02"), ("1", "n03"), ("2", "n01"), ("2", "n02"), ("2", "n03")),
    ]
    for row, start in zip(rows, (0, 3), strict=True):
        found = [float(line["top1_percent"]) for line in lines[start : start + 3]]
        assert found == [entry["top1_percent"] for entry in row["per_class"]]


def test_the_mean_of_the_classes_differs_from_top_1_where_their_sizes_differ():
    evaluation = Evaluation(1.0, 75.0, 100.0, 12, (8, 4, 0), (8, 1, 0))
    # The mean of 8 of 8 and 1 of 4; the third class has no images.
    assert evaluation.mean_class_top1_percent == 62.5


def test_the_mean_of_the_classes_is_printed(sret, images, tmp_path):
    directory = converted(filled(small(num_classes=3)), tmp_path)
    for number in range(3):
        os.remove(images / "val" / "n03" / f"{number}.jpeg")
    options = ("--data-dir", images, "--workers", 0)
    code, out, _ = sret("eval", directory, *options, "--json")
    (row,) = json.loads(out)
    mean = sum(entry["top1_percent"] for entry in row["per_class"]) / 3
    assert row["mean_class_top1_percent"] == pytest.approx(mean)
    code, out, _ = sret("eval", directory, *options, "--per-class")
    assert f"Mean per-class top-1 (%): {mean:.2f}" in out
    assert "small, layers 6" in out


def test_only_a_file_of_the_same_kind_is_replaced(sret, images, tmp_path):
    directory = converted(filled(small(num_classes=3)), tmp_path)
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    for name, text in (
        ("mine.csv", "mine.csv is another file; choose another --out"),
        ("table.txt", "--out table.txt: name a file that ends in .csv"),
    ):
        code, out, err = sret("eval", directory, "--data-dir", images, "--out", name)
        assert (code, out, err) == (2, "", f"sret: {text}\n")
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
