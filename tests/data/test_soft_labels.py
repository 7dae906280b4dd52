import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import stop_at
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from sret_cli.data.augment import temporarily_seeded
from sret_cli.data.prepare import find_source, load_data
from sret_cli.data.soft_labels import LabelsSpec, StoredLabels, draw_crop, spread_probabilities
from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.runtime.progress import Progress
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.training.distill import create_distillation
from sret_cli.training.label_writer import IMAGENET_IMAGES, write_labels
from sret_cli.training.session import train
from sret_cli.training.teacher import Teacher
from sret_cli.training.trainer import Trainer
from sret_cli.weights.store import save_model

CPU = torch.device("cpu")
SHORT = {"epochs": 2, "warmup_epochs": 0, "batch_size": 4}


@pytest.fixture
def pets(tiny):
    """A tiny model of two classes."""
    return tiny.with_values(num_classes=2)


@pytest.fixture
def folder(tmp_path):
    """Eight 20x24 images in each of two classes, in train/ and two of each in test/."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                path = tmp_path / "data" / split / name / f"{number}.png"
                Image.fromarray(pixels).save(path)
    return tmp_path / "data"


@pytest.fixture
def teacher(pets, tmp_path):
    """The directory of a model of two classes whose probabilities are far from even."""
    torch.manual_seed(0)
    model = build_model(pets)
    torch.nn.init.normal_(model.head.weight, std=2.0)
    save_model(model, tmp_path / "teacher")
    return tmp_path / "teacher"


def spec_of(folder, **values):
    return TrainSpec(**{"data_dir": str(folder), **SHORT, **values})


def write(folder, pets, teacher, name="labels", **values):
    """Labels of three crops an image, eight images at a time."""
    progress = {key: values.pop(key) for key in ("on_step", "note") if key in values}
    progress = Progress(**{"note": lambda line: None, **progress})
    options = RunOptions(workers=values.pop("workers", 0))
    spec = spec_of(folder, teacher=str(teacher), **values)
    directory = teacher.parent / name
    write_labels(spec, pets, directory, crops=3, batch_size=24, options=options, progress=progress)
    return directory


@pytest.fixture
def labels(folder, pets, teacher):
    return write(folder, pets, teacher)


def header(**values):
    """How labels of ten crops of ImageNet's kind are made."""
    teacher = {"teacher": "resnet50", "teacher_img_size": 224, "precision": "fp32", "seed": 0}
    images = {"images": 2, "images_sha256": "", "num_classes": 1000, "in_chans": 3, "img_size": 16}
    crops = {"scale": (0.08, 1.0), "hflip": 0.5, "interpolation": "bicubic", "crops": 10}
    return LabelsSpec(
        **{**teacher, **images, **crops, "distill_temperature": 1.0, "top_k": 10, **values}
    )


def test_a_crop_of_ten_classes_takes_49_bytes_and_ten_of_imagenet_628_megabytes():
    assert header().record.itemsize == 4 * 2 + 1 + 10 * 2 + 10 * 2 == 49
    assert header().size_bytes() == 2 * 10 * 49
    assert header().size_bytes(IMAGENET_IMAGES) == 627_771_830


def test_what_is_left_to_one_is_spread_over_the_other_classes():
    best = torch.tensor([[[1.0, 3.0], [0.6, 0.2]]])
    assert spread_probabilities(best, 4)[0].tolist() == pytest.approx([0.1, 0.6, 0.1, 0.2])
    whole = torch.tensor([[[1.0, 0.0], [0.75, 0.2505]]])  # as fp16 may round them
    assert spread_probabilities(whole, 2).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_a_crop_is_what_timms_training_transform_cuts():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (60, 40, 3), dtype=np.uint8))
    transform = RandomResizedCropAndInterpolation(16, (0.08, 1.0), interpolation="bicubic")
    for index in range(20):
        with temporarily_seeded(f"0 {index} crop 3"):
            expected = np.asarray(transform(image)).transpose(2, 0, 1)
        crop = draw_crop(image, header(hflip=0.0), index, 3)
        pixels = crop.cut(image, header())
        assert np.array_equal(pixels, expected)
        flipped = crop._replace(flip=True).cut(image, header())
        assert np.array_equal(flipped, expected[:, :, ::-1])


def test_teacher_and_student_see_bitwise_the_same_pixels(folder, pets, teacher, monkeypatch):
    seen, call = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, x: seen.append(x) or call(self, x))
    stored = StoredLabels(write(folder, pets, teacher))
    loader, _ = load_data(spec_of(folder, soft_labels=str(stored.directory)), pets)
    taught = torch.cat(seen).unflatten(0, (16, 3))
    flips = 0
    for index in range(16):
        for number in range(3):
            image, best = loader.samples[number, index, 0]
            x = loader.normalize(image[None])
            assert torch.equal(x[0], taught[index, number])
            said = call(Teacher(spec_of(folder, teacher=str(teacher)), pets, CPU), x).softmax(1)[0]
            assert said[best[0].long()].tolist() == pytest.approx(best[1].tolist(), abs=1e-3)
            assert best[1][0] >= best[1][1]
            flips += int(stored.records[number, index]["flip"])
    assert 10 < flips < 38  # of 48


def test_epochs_take_the_crops_in_turn(folder, pets, labels):
    samples = load_data(spec_of(folder, soft_labels=str(labels)), pets)[0].samples
    crops = [samples[epoch, 5, 0][0] for epoch in range(6)]
    assert all(torch.equal(crops[n], crops[n + 3]) for n in range(3))
    assert not torch.equal(crops[0], crops[1])
    assert torch.equal(samples[0, 5, 1][0], crops[1])  # a repeat within the epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_neither_on_the_workers_nor_on_the_start_of_the_epoch(
    folder, pets, labels, workers
):
    train_spec = spec_of(folder, soft_labels=str(labels))
    whole = list(load_data(train_spec, pets)[0].epoch(1))
    rest = list(load_data(train_spec, pets, workers)[0].epoch(1, start=2))
    assert (len(whole), len(rest)) == (4, 2)
    assert whole[0][1].shape == (4, 2, 2)
    for (x, target), (y, other) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(target, other)


def test_the_stored_loss_is_that_of_the_live_teacher_but_for_sixteen_bits(
    folder, pets, teacher, labels
):
    loader, _ = load_data(spec_of(folder, soft_labels=str(labels)), pets)
    live = create_distillation(spec_of(folder, teacher=str(teacher)), pets, CPU)
    stored = create_distillation(spec_of(folder, soft_labels=str(labels)), pets, CPU)
    for images, target in loader.epoch(0):
        x, output = loader.normalize(images), torch.tensor([[1.0, -1.0]]).expand(4, -1)
        expected = live.loss(output, x, target).item()
        assert stored.loss(output, x, target).item() == pytest.approx(expected, abs=2e-3)


def test_labels_go_on_after_a_process_that_loads_images_was_killed(folder, pets, teacher, labels):
    def kill(done, total, text):
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(SretError, match="loads images was killed .* fewer --workers") as refused:
        write(folder, pets, teacher, "killed", workers=1, on_step=kill)
    assert (refused.value.code, refused.value.status) == (7, "loader_lost")
    again = write(folder, pets, teacher, "killed")
    assert (again / "labels.bin").read_bytes() == (labels / "labels.bin").read_bytes()


@pytest.mark.slow
def test_training_needs_no_teacher_and_goes_on_bitwise_after_a_signal(
    folder, pets, teacher, labels, tmp_path
):
    shutil.rmtree(teacher)
    run = Run("test", "tiny", pets, spec_of(folder, soft_labels=str(labels), accumulation=2))
    row = train(run, tmp_path / "whole", options=RunOptions(workers=0))
    assert row["test_images"] == 4
    with pytest.raises(SystemExit):
        train(
            run,
            tmp_path / "killed",
            options=RunOptions(workers=0),
            progress=Progress(on_step=stop_at(3)),
        )
    train(run, tmp_path / "killed", options=RunOptions(workers=0))
    for name in ("model.safetensors", "metrics.jsonl"):
        whole, killed = ((tmp_path / d / name).read_bytes() for d in ("whole", "killed"))
        assert whole == killed


def test_a_step_in_parts_has_the_gradient_of_the_whole(folder, pets, labels):
    gradients = []
    for parts in (1, 2):
        spec = spec_of(folder, soft_labels=str(labels), accumulation=parts, clip_grad=0.0)
        trainer = Trainer(Run("t", "t", pets, spec), load_data(spec, pets)[0], CPU)
        losses = [trainer.step(*batch) for batch in trainer.loader.epoch(0)]
        gradients.append(losses)
    assert gradients[0] == pytest.approx(gradients[1], rel=0.02)


def test_writing_goes_on_where_it_was_interrupted(folder, pets, teacher, labels):
    def interrupt(done, total, text):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(folder, pets, teacher, "other", on_step=interrupt)
    other = teacher.parent / "other"
    with pytest.raises(SretError, match="are not finished: resume `sret distill-labels`"):
        StoredLabels(other)
    with pytest.raises(SretError, match="has labels with seed = 0, not 1; choose another"):
        write(folder, pets, teacher, "other", seed=1)
    steps = []
    write(folder, pets, teacher, "other", on_step=lambda done, *_: steps.append(done), workers=2)
    assert steps == [16]
    for name in ("labels.bin", "labels.json"):
        assert (other / name).read_bytes() == (labels / name).read_bytes()
    assert not (other / "labels.part.json").exists()
    said = []
    write(folder, pets, teacher, "other", note=said.append)
    assert said[-1] == f"{other} already has these labels"


def test_the_size_is_told_before_anything_is_written(folder, pets, teacher):
    said = []
    labels = teacher.parent / "labels"
    write(folder, pets, teacher, note=lambda line: said.append((line, labels.exists())))
    assert said[0][0].startswith("the names of the classes of the teacher")
    assert said[1:] == [
        (
            "labels of 16 images, 3 crops each, 17 bytes a crop: 0.0 MB; ImageNet's "
            "1,281,167 images would take 65.3 MB",
            False,
        )
    ]


def test_what_is_said_of_bad_images_goes_to_the_function_that_was_handed_in(
    folder, pets, teacher, capfd
):
    bad = folder / "train" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    odd = folder / "train" / "dog" / "0.png"
    Image.new("P", (20, 24)).save(odd, transparency=bytes([99]))
    said = []
    write(folder, pets, teacher, note=said.append, on_bad_image="skip", workers=2)
    said = [line for line in said if not line.startswith("the names of the classes")]
    assert len(said) == 3 and said[0].startswith("labels of 16 images")
    assert said[1].startswith(f"cannot read {bad}: ") and said[1].endswith("; it has no label")
    assert said[2].startswith(f"{odd}: Palette images with Transparency")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": (0.2, 1.0)}, r"made with train.scale = \(0.5, 1.0\), and the run has \(0.2, "),
        ({"hflip": 0.0}, "made with train.hflip = 0.5, and the run has 0.0"),
        ({"interpolation": "bilinear"}, "made with train.interpolation = bicubic"),
        ({"distill_temperature": 2.0}, "made with train.distill_temperature = 1.0"),
    ],
)
def test_labels_of_other_crops_are_refused(folder, pets, labels, values, message):
    with pytest.raises(SretError, match=message) as refused:
        load_data(spec_of(folder, soft_labels=str(labels), **values), pets)
    assert refused.value.code == 4


def test_labels_of_another_model_or_other_images_are_refused(folder, pets, labels):
    spec = spec_of(folder, soft_labels=str(labels))
    with pytest.raises(SretError, match="made with model.img_size = 16, and the run has 32"):
        load_data(spec, pets.with_values(img_size=32))
    with pytest.raises(SretError, match="made with model.num_classes = 2, and the run has 3"):
        load_data(spec, pets.with_values(num_classes=3))
    shutil.move(folder, folder.parent / "moved")
    load_data(spec_of(folder.parent / "moved", soft_labels=str(labels)), pets)
    (folder.parent / "moved" / "train" / "cat" / "3.png").rename(
        folder.parent / "moved" / "train" / "cat" / "33.png"
    )
    message = "belong to 16 images other than the 16 training images: train/cat/3.png is missing"
    with pytest.raises(SretError, match=message):
        load_data(spec_of(folder.parent / "moved", soft_labels=str(labels)), pets)


def test_labels_of_images_with_other_pixels_are_refused(folder, pets, labels):
    path = folder / "train" / "dog" / "5.png"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    message = "other than the 16 training images: train/dog/5.png has other bytes; write new"
    with pytest.raises(SretError, match=message) as refused:
        load_data(spec_of(folder, soft_labels=str(labels)), pets)
    assert refused.value.code == 4
    path.write_bytes(data)
    (labels / "images.json").unlink()  # which names what differs, and is not needed
    load_data(spec_of(folder, soft_labels=str(labels)), pets)


def test_labels_go_on_with_the_same_teacher_elsewhere(folder, pets, teacher, labels):
    moved = teacher.parent / "moved"
    shutil.copytree(teacher, moved)
    said = []
    write(folder, pets, moved, note=said.append)
    assert said[-1] == f"{labels} already has these labels"


def test_an_image_that_is_smaller_than_its_crop_is_named(folder, pets, labels):
    spec = spec_of(folder, soft_labels=str(labels))
    loader, _ = load_data(spec, pets)
    Image.new("RGB", (4, 4)).save(folder / "train" / "cat" / "0.png")
    with pytest.raises(SretError, match=r"train/cat/0\.png has \d+ bytes, not \d+"):
        load_data(spec, pets)
    with pytest.raises(SretError, match=r"cat/0\.png has no label .* or is another image"):
        list(loader.epoch(0))


def test_labels_that_are_damaged_or_missing_are_refused(folder, pets, labels):
    def refused(code, message):
        with pytest.raises(SretError, match=message) as error:
            load_data(spec_of(folder, soft_labels=str(labels)), pets)
        assert error.value.code == code

    records = (labels / "labels.bin").read_bytes()
    (labels / "labels.bin").write_bytes(records[:100] + bytes([records[100] ^ 1]) + records[101:])
    refused(5, "another SHA-256 than labels.json says: it is damaged")
    (labels / "labels.bin").write_bytes(records[:-1])
    refused(5, "has 815 bytes, not 816: it is damaged")
    about = json.loads((labels / "labels.json").read_text())
    (labels / "labels.json").write_text(json.dumps({**about, "version": 2}))
    refused(5, "is damaged or of another version")
    (labels / "labels.json").write_text("[1]")
    refused(5, "is damaged or of another version")
    shutil.rmtree(labels)
    refused(4, "do not exist: run `sret distill-labels`")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_stop_the_writing_or_have_no_label(
    folder, pets, teacher, workers
):
    (folder / "train" / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(SretError, match=r"cannot read .*dog/3\.png") as refused:
        write(folder, pets, teacher, workers=workers)
    assert refused.value.code == 4
    skips = {"on_bad_image": "skip"}
    labels = write(folder, pets, teacher, "skipped", workers=workers, **skips)
    loader, _ = load_data(spec_of(folder, soft_labels=str(labels), **skips), pets)
    assert sorted(len(x) for x, _ in loader.epoch(0)) == [3, 4, 4, 4]


def test_sources_whose_images_have_no_number_are_refused(pets, teacher, tmp_path):
    train_spec = TrainSpec(dataset="synthetic", teacher=str(teacher))
    with pytest.raises(SretError, match="'synthetic' has no numbered images to store labels for"):
        write_labels(train_spec, pets, tmp_path / "labels")
    assert not (tmp_path / "labels").exists()


def test_a_full_disk_is_told_with_the_bytes_before_the_teacher_works(
    folder, pets, teacher, monkeypatch
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SretError, match=r"no room left .*labels\.bin \(816 bytes") as refused:
        write(folder, pets, teacher)
    assert refused.value.code == 7


def test_stored_labels_go_without_the_augmentation_that_their_teacher_did_not_see():
    spec = TrainSpec(recipe="sret", data_dir="d", soft_labels="labels/")
    assert (spec.mixup, spec.cutmix, spec.reprob, spec.auto_augment) == (0.0, 0.0, 0.0, None)
    assert spec.soft_labels == "labels"
    assert TrainSpec(recipe="sret", data_dir="d", teacher="resnet50").mixup == 0.8
    with pytest.raises(SretError, match="mixup = 0.8 cannot be used with soft_labels"):
        TrainSpec(data_dir="d", soft_labels="labels", mixup=0.8)


def test_the_command_writes_labels_that_a_training_takes(sret, folder, pets, teacher):
    flags = ("--data-dir", folder, "--preset", "nano", "--img-size", 16, "--workers", 0)
    tiny = [f"{key}={json.dumps(getattr(pets, key))}" for key in ("embed_dims", "slices")]
    flags += tuple(part for text in tiny for part in ("--set", f"model.{text}"))
    code, out, err = sret(
        *("distill-labels", "--teacher", teacher, *flags, "--crops", 2, "--out", "labels")
    )
    assert code == 0, err
    assert out == "labels: 16 images, 2 crops, 544 bytes\n"
    assert "ImageNet's 1,281,167 images would take 43.6 MB" in err
    settings = ("--set", "train.soft_labels=labels", "--set", "train.warmup_epochs=0")
    cold = ("--temperature", 0, "--out", "cold")
    code, _, err = sret("distill-labels", "--teacher", teacher, *flags, *cold)
    assert (code, "distill_temperature" in err, "greater than 0" in err) == (3, True, True)
    code, out, err = sret("train", *flags, *settings, "--epochs", 1, "--batch-size", 4, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["test_images"] == 4
    code, _, err = sret("distill-labels", "--data-dir", folder)
    assert (code, err) == (2, "sret: no teacher is given; name a model with --teacher\n")


def test_digits_can_be_labelled(tiny, tmp_path):
    torch.manual_seed(0)
    save_model(build_model(tiny), tmp_path / "teacher")
    spec = TrainSpec(teacher=str(tmp_path / "teacher"))
    written = write_labels(
        spec, tiny, tmp_path / "labels", crops=1, top_k=3, progress=Progress(note=lambda line: None)
    )
    assert (written.images, written.top_k) == (1437, 3)
    student = TrainSpec(soft_labels=str(tmp_path / "labels"))
    stored = StoredLabels(tmp_path / "labels")
    assert stored.sample(find_source(student, tiny, True), 0, 0)[1].shape == (2, 3)
