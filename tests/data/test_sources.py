import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from helpers import NANO, add, data_spec, levels, png, write_tar
from PIL import Image

from sret_cli.data.check import Checked, check_file
from sret_cli.data.decode import decode_image, pillow_decodes
from sret_cli.data.folders import folder_classes
from sret_cli.data.prepare import load_data, load_test_data
from sret_cli.data.sources import Listed, Source
from sret_cli.data.streams import find_shards
from sret_cli.runtime.errors import SretError, show_note_once
from sret_cli.runtime.signals import Interrupted
from sret_cli.spec.train import TrainSpec
from sret_cli.study.resolve import resolve_run


def test_a_tar_file_of_class_folders_is_a_dataset(tmp_path):
    write_tar(tmp_path / "train.tar", {"cat": (1, 2), "cow": (3,), "dog": (4, 5, 6)})
    write_tar(tmp_path / "val.tar", {"dog": (7,), "cat": (8,)})
    train = data_spec("tar", tmp_path)
    assert resolve_run("s", {}, train.model_dump()).model.num_classes == 3
    loader, test = load_data(train, NANO, workers=2)
    assert sorted(levels(loader)) == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert sorted(levels(test)) == [(7, 2), (8, 0)]
    assert loader.classes == test.classes == ("cat", "cow", "dog")


def test_a_folder_of_tar_files_has_a_class_a_file(tmp_path):
    for split, name, shade in (("train", "a", 1), ("train", "b", 2), ("test", "b", 3)):
        (tmp_path / split).mkdir(exist_ok=True)
        with tarfile.open(tmp_path / split / f"{name}.tar", "w") as tar:
            add(tar, f"{shade}.png", png(shade))
    loader, test = load_data(data_spec("tar", tmp_path), NANO)
    assert sorted(levels(loader)) == [(1, 0), (2, 1)]
    assert levels(test) == [(3, 1)]


def test_tar_files_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(SretError, match="has neither train.tar"):
        load_data(data_spec("tar", tmp_path), NANO)
    (tmp_path / "train.tar").write_bytes(b"no tar")
    with pytest.raises(SretError, match="cannot read .*train.tar"):
        load_data(data_spec("tar", tmp_path), NANO)
    write_tar(tmp_path / "train.tar", {"cat": (1,), "dog": (2,)})
    write_tar(tmp_path / "test.tar", {"cow": (1,)})
    with pytest.raises(SretError, match="has the class 'cow'") as refused:
        load_data(data_spec("tar", tmp_path), NANO)
    assert refused.value.code == 4


def cut_after(path, members):
    """Leaves of a tar file so many members, whole, and not its end."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[members - 1]
    path.write_bytes(path.read_bytes()[: last.offset_data + -(-last.size // 512) * 512])


def test_a_tar_file_that_was_cut_between_two_members_is_refused(tmp_path):
    write_tar(tmp_path / "whole.tar", {"cat": (1, 2), "dog": (3, 4)})
    write_tar(tmp_path / "test.tar", {"cat": (1,), "dog": (2,)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes())
    cut_after(tmp_path / "cut.tar", 3)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("whole", "cut"):
            add(tar, f"{name}.tar", (tmp_path / f"{name}.tar").read_bytes())
    for _ in ("in a whole one", "alone"):
        with pytest.raises(SretError, match=r"train\.tar is cut short") as refused:
            load_data(data_spec("tar", tmp_path), NANO)
        assert refused.value.code == 4
        (tmp_path / "train.tar").write_bytes((tmp_path / "cut.tar").read_bytes())
    (tmp_path / "whole.tar").rename(tmp_path / "train.tar")
    load_data(data_spec("tar", tmp_path), NANO)


def test_hidden_files_in_a_tar_file_are_no_images_and_make_no_class(tmp_path):
    for name in ("train", "test"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for path in ("__MACOSX/._1.jpg", "cat/._1.jpg"):
                add(tar, path, b"Mac OS X, no image")
            for shade, path in enumerate(("cat/0.png", "dog/1.png")):
                add(tar, path, png(shade))
    for loader in load_data(data_spec("tar", tmp_path), NANO):
        assert loader.classes == ("cat", "dog")
        assert sorted(levels(loader)) == [(0, 0), (1, 1)]


def write_parquet(path, shades, targets, names=("cat", "dog")):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    features = Features({"img": ImageColumn(), "label": ClassLabel(names=list(names))})
    images = [{"bytes": png(shade), "path": None} for shade in shades]
    Dataset.from_dict({"img": images, "label": targets}, features).to_parquet(path)


def test_parquet_files_in_a_folder_are_a_dataset(hugging_face):
    write_parquet(hugging_face / "train-00000.parquet", (1, 2, 3, 4), (0, 0, 1, 1))
    write_parquet(hugging_face / "test-00000.parquet", (5, 6), (-1, -1))
    write_parquet(hugging_face / "validation-00000.parquet", (7, 8), (1, 0))
    for train in (data_spec("hfds", hugging_face), data_spec(f"hfds/{hugging_face}")):
        loader, test = load_data(train, NANO)
        assert sorted(levels(loader)) == [(1, 0), (2, 0), (3, 1), (4, 1)]
        assert levels(test) == [(7, 1), (8, 0)]  # the test images have no labels
        assert loader.classes == ("cat", "dog")


def test_classes_of_parquet_files_that_are_not_trained_on_are_refused(hugging_face):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    features = Features({"image": ImageColumn(), "label": Value("int64")})
    for split, targets in (("train", (0, 1, 2)), ("test", (0, 9))):
        images = [{"bytes": png(1), "path": None}] * len(targets)
        found = Dataset.from_dict({"image": images, "label": targets}, features)
        found.to_parquet(hugging_face / f"{split}-00000.parquet")
    with pytest.raises(SretError, match="holds the class 9, and there are 3 classes") as refused:
        load_data(data_spec("hfds", hugging_face), NANO)
    assert refused.value.code == 4


def test_nothing_is_downloaded_from_hugging_face(hugging_face):
    with pytest.raises(SretError, match="cannot read the dataset nobody/nothing") as refused:
        load_data(data_spec("hfds/nobody/nothing"), NANO)
    assert refused.value.code == 4


def test_a_bad_image_of_a_parquet_file_is_named_by_its_number(hugging_face):
    write_parquet(hugging_face / "train-00000.parquet", (1, 2), (0, 1))
    write_parquet(hugging_face / "test-00000.parquet", (1, 2), (0, 1))
    loader, _ = load_data(data_spec("hfds", hugging_face), NANO)
    reader = loader.samples.source.images
    reader.dataset = [{"img": {"bytes": b"no image", "path": None}, "label": 0}] * 2
    with pytest.raises(SretError, match=r"parquet train, image [01]: not an image"):
        list(loader.epoch(0))


def test_torchvisions_datasets_are_read_and_never_downloaded(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    with pytest.raises(SretError, match="Dataset not found or corrupted") as refused:
        load_data(data_spec("torch/cifar10", tmp_path), NANO)
    assert refused.value.code == 4
    with pytest.raises(SretError, match="Unknown torchvision dataset nonsense"):
        load_data(data_spec("torch/nonsense", tmp_path), NANO)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = np.arange(1, 5, dtype=np.uint8)[:, None].repeat(3072, 1)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {"data": pixels, "labels": [3, 1, 0, 9]}
        (base / name).write_bytes(pickle.dumps(batch))
    names = [f"class {n}" for n in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    train, test = load_data(data_spec("torch/cifar10", tmp_path), NANO)
    assert len(levels(train)) == 20
    assert levels(test) == [(1, 3), (2, 1), (3, 0), (4, 9)]
    assert train.classes[9] == "class 9"


def test_synthetic_images_are_a_function_of_the_seed_and_of_nothing_else():
    spec = NANO.with_values(num_classes=7)
    batches = []
    for workers, seed in ((0, 0), (2, 0), (0, 1)):
        loader, _ = load_data(data_spec("synthetic", seed=seed, batch_size=512), spec, workers)
        batches.append(next(iter(loader.epoch(0))))
    (x, targets), (same, _), (other, _) = batches
    assert x.shape == (512, 3, 16, 16)
    assert x.float().mean() == pytest.approx(127.5, abs=1)
    assert sorted(set(targets.tolist())) == [0, 1, 2, 3, 4, 5, 6]
    assert torch.equal(x, same)
    assert not torch.equal(x, other)
    assert len(loader) == 20


def test_imagenet_as_kaggle_unpacks_it_needs_its_folder_alone(tmp_path):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for name in ("train/n01/n01_1", "train/n02/n02_1", "val/val_1", "val/val_2", "test/test_1"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).with_suffix(".JPEG").write_bytes(png(int(name[-1])))
    labels = "ImageId,PredictionString\nval_1,n02 1 2 3 4 \nval_2,n01 5 6 7 8 n01 1 2 3 4 \n"
    (tmp_path / "LOC_val_solution.csv").write_text(labels)
    train = TrainSpec(data_dir=str(tmp_path))
    assert folder_classes(tmp_path) == ["n01", "n02"]
    loader, classes = load_test_data(train, NANO)
    assert classes == ("n01", "n02")
    assert levels(loader) == [(1, 1), (2, 0)]


def test_of_several_folders_the_first_with_classes_is_tested_on(tmp_path):
    for name in ("train/cat/1", "train/dog/2", "val/cat/3", "val/dog/4", "test/5"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).with_suffix(".png").write_bytes(png(int(name[-1])))
    _, test = load_data(TrainSpec(data_dir=str(tmp_path), batch_size=2), NANO)
    assert levels(test) == [(3, 0), (4, 1)]


def test_images_with_more_pixels_than_pillow_thinks_sane_are_refused(tmp_path, monkeypatch):
    for name in ("train/cat/1", "train/dog/2", "test/cat/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).with_suffix(".png").write_bytes(png(1, (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    _, test = load_data(TrainSpec(data_dir=str(tmp_path), batch_size=2), NANO)
    with pytest.raises(SretError, match=r"cat/3\.png: Image size \(1600 pixels\) exceeds limit"):
        list(test.epoch(0))


def test_images_are_trained_and_evaluated_on_by_name(sret, tmp_path):
    write_tar(tmp_path / "train.tar", {"cat": (1, 2), "dog": (3, 4)})
    write_tar(tmp_path / "test.tar", {"cat": (1, 2, 3), "dog": (4, 5)})
    model = ("--preset", "nano", "--img-size", 8, "--set", "train.warmup_epochs=0")
    data = ("--dataset", "tar", "--data-dir", ".", "--workers", 0)
    quick = ("--epochs", 1, "--batch-size", 2, "--json")
    code, out, _ = sret("train", *model, *data, *quick)
    (row,) = json.loads(out)
    assert (code, row["test_images"], row["bad_images"]) == (0, 5, 0)
    config = json.loads((tmp_path / "runs/train" / row["run_id"] / "config.json").read_text())
    assert config["classes"] == ["cat", "dog"]
    code, out, _ = sret("eval", *data, "--json")
    assert (code, json.loads(out)[0]["top1_percent"]) == (0, row["top1_percent"])


@pytest.fixture
def shards(tmp_path):
    """Shards of 3, 4 and 5 training images, one of 3 test images; an image's class is mod 4."""
    pytest.importorskip("webdataset")
    shade = 0
    for name, count in (("train-0", 3), ("train-1", 4), ("train-2", 5), ("val-0", 3)):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in range(count):
                add(tar, f"{number:04}.png", png(shade))
                add(tar, f"{number:04}.cls", str(shade % 4).encode())
                shade += 1
    return tmp_path


def test_shards_are_read_as_a_stream_of_labelled_images(shards):
    train = data_spec("wds", shards)
    assert resolve_run("s", {}, train.model_dump()).model.num_classes == 4
    loader, test = load_data(train, NANO)
    assert len(loader) == 6
    assert sorted(levels(loader)) == [(shade, shade % 4) for shade in range(12)]
    assert levels(loader, 0) == levels(loader, 0) != levels(loader, 1)
    assert levels(test) == [(12, 0), (13, 1), (14, 2)]


def test_a_stream_says_once_what_it_cannot_promise(shards, capsys):
    show_note_once.cache_clear()
    load_data(data_spec("wds", shards), NANO)
    load_data(data_spec("wds", shards), NANO)
    said = capsys.readouterr().err
    assert said.count("wds is a stream: the order of its samples depends on") == 1


def test_a_stream_goes_on_where_it_was_with_the_same_workers(shards):
    for workers in (0, 2):
        loader, _ = load_data(data_spec("wds", shards, scale=(0.5, 1.0)), NANO, workers)
        whole = [x for x, _ in loader.epoch(1)]
        assert len(whole) == len(loader) == 6
        for start in (1, 4):
            rest = [x for x, _ in loader.epoch(1, start)]
            assert len(rest) == 6 - start
            assert all(map(torch.equal, whole[start:], rest))


def test_a_test_stream_takes_each_image_once_on_any_number_of_ranks_and_workers(shards):
    for name in ("train-0", "train-1"):
        (shards / f"{name}.tar").rename(shards / f"val-{name[-1]}1.tar")
    for workers, world_size in ((0, 1), (2, 1), (0, 2), (2, 3)):
        tests = [
            load_test_data(data_spec("wds", shards), NANO, workers, rank, world_size)[0]
            for rank in range(world_size)
        ]
        seen = [shade for test in tests for shade, _ in levels(test)]
        assert sorted(seen) == [*range(7), 12, 13, 14]
        assert all(len(list(test.epoch(0))) == len(test) for test in tests)


def test_shards_that_cannot_be_used_say_why(shards):
    with pytest.raises(SretError, match="3 shards are too few for 4 processes"):
        load_data(data_spec("wds", shards, batch_size=4), NANO, 0, 0, 4)
    with pytest.raises(SretError, match="aug_repeats = 3 needs images by index"):
        load_data(data_spec("wds", shards, aug_repeats=3), NANO)
    (shards / "val-0.tar").unlink()
    with pytest.raises(SretError, match="has no shards .*test.*tar or .*val.*tar") as refused:
        load_data(data_spec("wds", shards, seed=1), NANO)
    assert refused.value.code == 4


def test_a_bad_image_in_a_shard_is_named_and_can_be_left_out(shards):
    with tarfile.open(shards / "train-3.tar", "w") as tar:
        add(tar, "bad.png", b"no image")
        add(tar, "bad.cls", b"1")
    loader, _ = load_data(data_spec("wds", shards), NANO)
    with pytest.raises(SretError, match=r"train-3\.tar, bad: not an image"):
        list(loader.epoch(0))
    loader, _ = load_data(data_spec("wds", shards, on_bad_image="skip", batch_size=13), NANO)
    assert sorted(levels(loader)) == [(shade, shade % 4) for shade in range(12)]
    (text,) = loader.bad_images
    assert "train-3.tar, bad: not an image" in text


def test_a_shard_that_was_cut_between_two_samples_is_refused(shards):
    cut_after(shards / "train-1.tar", 4)
    with pytest.raises(SretError, match=r"train-1\.tar is cut short") as refused:
        load_data(data_spec("wds", shards), NANO)
    assert refused.value.code == 4


def test_a_shard_without_samples_is_refused(shards):
    with tarfile.open(shards / "train-3.tar", "w"):
        pass
    with pytest.raises(SretError, match=r"train-3\.tar has no samples") as refused:
        load_data(data_spec("wds", shards), NANO)
    assert refused.value.code == 4
    splits = {"train": {"filenames": ["train-3.tar"], "shard_lengths": [1]}}
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    for number in range(3):
        (shards / f"train-{number}.tar").unlink()
    find_shards.cache_clear()
    loader, _ = load_data(data_spec("wds", shards), NANO)
    with pytest.raises(SretError, match=r"no samples in .*train-3\.tar"):
        list(loader.epoch(0))


def test_classes_of_shards_that_are_not_trained_on_are_refused(shards):
    with tarfile.open(shards / "val-1.tar", "w") as tar:
        add(tar, "0.png", png(1))
        add(tar, "0.cls", b"7")
    with pytest.raises(SretError, match="have 8 classes, up to 7, and the training images") as no:
        load_data(data_spec("wds", shards), NANO)
    assert no.value.code == 4
    four = NANO.with_values(num_classes=4)
    for name in ("train-0", "train-1"):
        (shards / f"{name}.tar").unlink()
    names = ["train-2.tar", "val-0.tar", "val-1.tar"]
    splits = {"all": {"filenames": names, "shard_lengths": [5, 3, 1]}}
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    find_shards.cache_clear()
    _, test = load_data(data_spec("wds", shards), four)
    with pytest.raises(SretError, match=r"val-1\.tar, 0: it has the class 7, and the model has 4"):
        list(test.epoch(0))


def test_an_info_file_spares_the_counting(shards):
    splits = {"train": {"filenames": ["train-0.tar", "train-1.tar"], "shard_lengths": [30, 40]}}
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    (shards / "train-2.tar").unlink()
    loader, _ = load_data(data_spec("wds", shards), NANO)
    assert len(loader) == 35


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, NotImplementedError])
def test_whatever_a_decoder_raises_of_a_damaged_image_names_it(tmp_path, monkeypatch, kind):
    def load(image):
        raise kind("Failed to decode image")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    (tmp_path / "0.png").write_bytes(png(1))
    source = Source("pets", Listed([str(tmp_path / "0.png")], [0]), ("cat",))
    with pytest.raises(
        SretError, match=r"cannot read .*0\.png: Pillow cannot decode it"
    ) as refused:
        source.open(0, "RGB")
    assert refused.value.code == 4
    checked = check_file(Checked(str(tmp_path / "0.png"), "train", "cat"))
    assert kind.__name__ in checked.error


def test_what_is_no_damage_of_an_image_is_not_taken_for_it():
    for kind in (MemoryError, Interrupted):
        with pytest.raises(kind), pillow_decodes():
            raise kind(75)


def test_pixels_of_32_bits_that_may_be_of_any_range_are_refused_and_dark_16_bits_are_not():
    def encoded(pixels, kind):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        return io.BytesIO(file.getvalue())

    dark = np.arange(0, 256, 4).reshape(8, 8)
    with pytest.raises(ValueError, match="at most 252 have no known range; convert the image"):
        decode_image(encoded(dark.astype(np.int32), "TIFF"), "L")
    assert decode_image(encoded(dark.astype(np.int32) * 257, "TIFF"), "L").getextrema() == (0, 252)
    for kind in ("PNG", "TIFF"):
        assert decode_image(encoded(dark.astype(np.uint16), kind), "L").getextrema() == (0, 0)
