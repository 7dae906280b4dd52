import json
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import data_spec, png, write_tar
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from sret_cli.data.augment import Pixels
from sret_cli.data.class_names import ClassList, config_classes, match_classes, order_classes
from sret_cli.data.prepare import load_data
from sret_cli.data.readers import known_source
from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError, show_note_once
from sret_cli.runtime.progress import Progress
from sret_cli.spec.contents import Contents
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.options import RunOptions
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.resolve import continue_run
from sret_cli.training.evaluate import evaluate
from sret_cli.training.identify import Identifier
from sret_cli.training.label_writer import write_labels
from sret_cli.training.session import train
from sret_cli.training.teacher import Teacher
from sret_cli.training.trainer import Trainer
from sret_cli.weights.store import load_model, save_model

CPU = torch.device("cpu")
NUMBERS = tuple(map(str, range(11)))
AS_TEXT = ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")  # the order of earlier versions
QUICK = {"batch_size": 16, "warmup_epochs": 0, "crop_pct": 1.0, "epochs": 1}


@pytest.fixture(autouse=True)
def _notes_are_new():
    show_note_once.cache_clear()


@pytest.fixture
def eleven():
    """A model of one layer and eleven classes, which learns in seconds."""
    one = {"blocks": (1,), "recursions": 1, "slices": 1, "recursive_slices": 1}
    shape = {"stem_strides": (1, 2, 2), "embed_dims": (64,), "num_heads": (2,)}
    return ModelSpec(img_size=16, num_classes=11, **shape, **one)


@pytest.fixture
def numbered(tmp_path):
    """Folders 0 to 10 of images of one pattern each, and tar files of the same."""
    patterns = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 3), dtype=np.uint8)
    for split, count in (("train", 4), ("test", 2)):
        for name, pattern in zip(NUMBERS, patterns, strict=True):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pattern).resize((16, 16), Image.Resampling.NEAREST)
                image.save(tmp_path / "data" / split / name / f"{number}.png")
        shutil.make_archive(tmp_path / "data" / split, "tar", tmp_path / "data" / split)
    return tmp_path / "data"


def as_text(monkeypatch, read=True):
    """Has folders be numbered as earlier versions did, or again as this one does."""
    monkeypatch.setattr("sret_cli.data.folders.order_classes", sorted if read else order_classes)


def run_of(model, data, dataset="folder", **values):
    return Run("s", "n", model, data_spec(dataset, data, **{**QUICK, **values}))


def identified(run):
    """The run with its id; what was listed for it is forgotten, as in a process of its own."""
    run = Identifier().identify(run)
    known_source.cache_clear()
    return run


def saved(directory, model, classes):
    """The directory of an untrained model of these classes."""
    torch.manual_seed(0)
    model = build_model(model)
    torch.nn.init.normal_(model.head.weight, std=2.0)
    save_model(model, directory, {"classes": list(classes)})
    return directory


def test_classes_have_timms_order_whatever_keeps_the_images(tmp_path):
    names = ("b", "A", "img12", "img2", "10", "2")
    for split in ("train", "test"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png(1))
        write_tar(tmp_path / f"{split}.tar", dict.fromkeys(names, (1,)))
    expected = ("2", "10", "A", "b", "img2", "img12")
    assert tuple(ReaderImageFolder(str(tmp_path / "train")).class_to_idx) == expected
    for dataset in ("folder", "tar"):
        loader, test = load_data(data_spec(dataset, tmp_path), PRESETS["nano"])
        assert loader.classes == test.classes == expected
    assert order_classes(["a", "A", "B", "²"]) == ["A", "a", "B", "²"]


def test_lists_of_classes_are_compared_by_name(capsys):
    ours = ClassList(("cat", "cow", "dog"), "the images")
    same = ClassList(("cat", "cow", "dog"), "the teacher")
    assert match_classes(ours, same) is None
    assert capsys.readouterr().err == ""
    other_order = ClassList(("dog", "cat", "cow"), "the teacher")
    assert match_classes(ours, other_order) == (1, 2, 0)
    assert capsys.readouterr().err == (
        "sret: the teacher and the images have the same 3 classes in another order; they are "
        "matched by name\n"
    )
    assert match_classes(ours, ClassList(None, "the teacher")) is None
    assert "only the number of classes can be compared with the images" in capsys.readouterr().err


def test_the_first_names_that_differ_are_named():
    ours = ClassList(("cat", "dog", "hen"), "the images")
    theirs = ClassList(("cat", "cow", "emu"), "the teacher", "use another", 5)
    expected = "different classes: 'cow' is only in the first, 'dog' is only in the second; use an"
    with pytest.raises(SretError, match=f"^the teacher and the images have {expected}") as refused:
        match_classes(ours, theirs)
    assert refused.value.code == 5
    with pytest.raises(SretError, match="have different classes: 'hen' is only in the second$"):
        match_classes(ours, ClassList(("dog", "cat"), "the teacher"))
    twice = ClassList(("crane", "crane", "cat"), "the images")
    with pytest.raises(SretError, match="two have the name 'crane'") as refused:
        match_classes(twice, ClassList(("cat", "crane", "crane"), "the teacher"))
    assert refused.value.code == 4


def test_a_config_tells_the_names_of_classes_where_they_are_known():
    assert config_classes({"train": {"dataset": "folder"}, "classes": ["b", "a"]}) == ("b", "a")
    assert config_classes({"train": {"dataset": "digits"}}) == tuple("0123456789")
    assert config_classes({"train": {"dataset": "wds"}, "classes": ["0", "1"]}) is None
    named = {"train": {"dataset": "wds", "label_column": "name"}, "classes": ["cat", "dog"]}
    assert config_classes(named) == ("cat", "dog")
    assert config_classes({"model": {}, "train": None}) is None


def trained(run):
    """A trainer at the end of its epochs, its classes, and its top-1 on the test images."""
    loader, test = load_data(run.train, run.model)
    trainer = Trainer(run, loader, CPU)
    trainer.module.train()
    for epoch in range(run.train.epochs):
        for images, target in loader.epoch(epoch):
            trainer.step(images, target)
    return trainer.module, test.classes, evaluate(trainer.module, test, CPU).top1_percent


def test_a_student_learns_by_name_from_a_teacher_that_numbers_classes_otherwise(
    eleven, numbered, tmp_path, monkeypatch, capsys
):
    long = {"epochs": 16, "batch_size": 22, "lr": 3e-3, "smoothing": 0.0}
    as_text(monkeypatch)
    model, classes, top1 = trained(run_of(eleven, numbered, **long))
    assert (classes, top1) == (AS_TEXT, 100.0)
    save_model(model, tmp_path / "teacher", {"classes": list(classes)})
    as_text(monkeypatch, read=False)
    student = run_of(eleven, numbered, "tar", teacher=str(tmp_path / "teacher"), **long)
    _, classes, top1 = trained(student)
    assert (classes, top1) == (NUMBERS, 100.0)
    said = capsys.readouterr().err
    assert "and the training images have the same 11 classes in another order" in said


def test_a_teacher_of_other_classes_is_refused_by_name(sret, eleven, numbered, tmp_path):
    saved(tmp_path / "teacher", eleven, [*NUMBERS[:-1], "ten"])
    model = ("--preset", "nano", "--img-size", 16, "--data-dir", numbered, "--workers", 0)
    expected = "different classes: 'ten' is only in the first, '10' is only in the second"
    for command in (
        ("train", "--set", f"train.teacher={tmp_path / 'teacher'}"),
        ("distill-labels", "--teacher", tmp_path / "teacher", "--out", tmp_path / "labels"),
        ("eval", tmp_path / "teacher", "--data-dir", numbered, "--workers", 0),
    ):
        flags = model if command[0] != "eval" else ()
        code, _, error = sret(*command, *flags)
        assert code == 4, error
        assert expected in error
    assert not (tmp_path / "labels" / "labels.json").exists()


def test_digits_have_names_to_compare(sret, tiny, folder, tmp_path):
    pets = tiny.with_values(num_classes=10)
    spec = TrainSpec(teacher=str(saved(tmp_path / "teacher", pets, "abcdefghij")))
    loader, _ = load_data(spec, pets)
    with pytest.raises(SretError, match="'a' is only in the first, '0' is only in the second"):
        Teacher(spec, pets, CPU, loader.class_list)


def test_logits_of_a_teacher_come_in_the_order_of_the_student(tiny, tmp_path):
    model = tiny.with_values(num_classes=4)  # one more than there are classes
    directory = saved(tmp_path / "teacher", model, ("dog", "cat", "cow"))
    spec, x = TrainSpec(teacher=str(directory)), torch.randn(2, 3, 16, 16)
    plain = Teacher(spec, model, CPU)(x)
    matched = Teacher(spec, model, CPU, ClassList(("cat", "cow", "dog"), "the images"))(x)
    assert torch.equal(matched, plain[:, [1, 2, 0, 3]])


def test_timms_weights_for_imagenet_have_names_where_the_images_have_them(
    tiny, monkeypatch, capsys
):
    from timm.data import ImageNetInfo

    model = timm.create_model("test_resnet")
    monkeypatch.setattr("sret_cli.training.teacher._pretrained", lambda train, student: model)
    synsets = ImageNetInfo().label_names()
    assert synsets[0] == "n01440764"
    student, spec = tiny.with_values(num_classes=1000), TrainSpec(teacher="test_resnet")
    swapped = ClassList((synsets[1], synsets[0], *synsets[2:]), "the images")
    assert Teacher(spec, student, CPU, swapped).order[:3].tolist() == [1, 0, 2]
    others = ClassList(("tench", *synsets[1:]), "the images")
    with pytest.raises(SretError, match="'n01440764' is only in the first, 'tench' is only in"):
        Teacher(spec, student, CPU, others)
    show_note_once.cache_clear()
    plain = ClassList(tuple(map(str, range(1000))), "the images")
    assert Teacher(spec, student, CPU, plain).order is None
    assert "the names of the classes of the teacher test_resnet are not known: only the number" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("with_names", [True, False])
def test_labels_that_number_classes_otherwise_keep_their_numbers(
    eleven, numbered, tmp_path, monkeypatch, with_names
):
    directory, labels = saved(tmp_path / "teacher", eleven, NUMBERS), tmp_path / "labels"
    as_text(monkeypatch)
    spec = data_spec("folder", numbered, **QUICK, teacher=str(directory))
    write_labels(
        spec,
        eleven,
        labels,
        crops=1,
        top_k=11,
        options=RunOptions(workers=0),
        progress=Progress(note=lambda line: None),
    )
    header = json.loads((labels / "labels.json").read_text())
    assert header["classes"] == list(AS_TEXT)
    if not with_names:  # as earlier versions wrote them
        del header["classes"]
        (labels / "labels.json").write_text(json.dumps(header))
    as_text(monkeypatch, read=False)
    again = []
    write_labels(
        spec,
        eleven,
        labels,
        crops=1,
        top_k=11,
        options=RunOptions(workers=0),
        progress=Progress(note=again.append),
    )
    assert again[-1] == f"{labels} already has these labels"
    spec = data_spec("folder", numbered, **QUICK, soft_labels=str(labels))
    loader, test = load_data(spec, eleven)
    assert loader.classes == test.classes == AS_TEXT
    teacher = Teacher(data_spec("folder", numbered, teacher=str(directory)), eleven, CPU)
    for index in (0, 9, 43):  # of the classes 0, 10 and 9
        x, best = loader.samples[0, index, 0]
        said = teacher(loader.normalize(x[None])).softmax(1)[0, list(map(int, AS_TEXT))]
        assert int(best[0, 0]) == int(said.argmax())
    assert sorted({target for _, targets in test.epoch(0) for target in targets.tolist()}) == [
        *range(11)
    ]


def test_labels_of_other_classes_are_refused_by_name(eleven, numbered, tmp_path):
    directory, labels = saved(tmp_path / "teacher", eleven, NUMBERS), tmp_path / "labels"
    spec = data_spec("folder", numbered, **QUICK, teacher=str(directory))
    write_labels(
        spec,
        eleven,
        labels,
        crops=1,
        top_k=11,
        options=RunOptions(workers=0),
        progress=Progress(note=lambda line: None),
    )
    for split in ("train", "test"):
        (numbered / split / "10").rename(numbered / split / "ten")
    with pytest.raises(SretError, match="'10' is only in the first, 'ten' is only") as refused:
        load_data(data_spec("folder", numbered, **QUICK, soft_labels=str(labels)), eleven)
    assert refused.value.code == 4


def test_a_run_keeps_the_numbers_of_its_classes_to_the_bit(
    eleven, numbered, tmp_path, monkeypatch, capsys
):
    as_text(monkeypatch)
    first = identified(run_of(eleven, numbered))
    was = first.directory(tmp_path / "was")
    train(first, was, options=RunOptions(device="cpu", workers=0))
    shutil.copytree(tmp_path / "was", tmp_path / "now")
    runs = [continue_run(first.directory(tmp_path / name), 2) for name in ("was", "now")]
    train(runs[0], runs[0].directory(tmp_path / "was"), options=RunOptions(device="cpu", workers=0))
    as_text(monkeypatch, read=False)
    capsys.readouterr()
    now = runs[1].directory(tmp_path / "now")
    train(runs[1], now, options=RunOptions(device="cpu", workers=0))
    assert "have the same 11 classes in another order" in capsys.readouterr().err
    assert json.loads((now / "config.json").read_text())["classes"] == list(AS_TEXT)
    weights = [
        (d / "model.safetensors").read_bytes() for d in (runs[0].directory(tmp_path / "was"), now)
    ]
    assert weights[0] == weights[1]


def test_a_run_does_not_go_on_with_other_classes(eleven, numbered, tmp_path):
    first = identified(run_of(eleven, numbered))
    train(first, first.directory(tmp_path), options=RunOptions(device="cpu", workers=0))
    for split in ("train", "test"):
        (numbered / split / "10").rename(numbered / split / "ten")
    longer = continue_run(first.directory(tmp_path), 2)
    with pytest.raises(SretError, match="'10' is only in the first, 'ten' is only") as refused:
        train(longer, longer.directory(tmp_path), options=RunOptions(device="cpu", workers=0))
    assert refused.value.code == 5


def test_a_model_is_evaluated_by_the_names_of_its_classes(sret, eleven, numbered, tmp_path):
    rows = []
    for name, order in (("plain", NUMBERS), ("text", AS_TEXT)):
        directory = saved(tmp_path / name, eleven, order)
        code, out, _ = sret("eval", directory, "--data-dir", numbered, "--workers", 0, "--json")
        assert code == 0
        rows.append({line["class"]: line for line in json.loads(out)[0]["per_class"]})
    model = load_model(tmp_path / "text").eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in timm_constants())
    settings = TrainSpec(
        data_dir=str(numbered)
    )  # as images for a model from elsewhere are prepared
    prepared = Pixels.of(settings, eleven).transform(settings)
    for name in NUMBERS:
        x = prepared(Image.open(numbered / "test" / name / "0.png").convert("RGB"))[None] / 255
        right = AS_TEXT[int(model((x - mean) / std).argmax())] == name
        assert rows[1][name]["top1_percent"] == 100.0 * right


def timm_constants():
    return timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def test_a_head_to_start_from_is_put_into_the_order_of_the_images(tiny, folder, tmp_path):
    model = tiny.with_values(num_classes=2)
    directory = saved(tmp_path / "init", model, ("dog", "cat"))
    run = run_of(model, folder, init=str(directory))
    trainer = Trainer(run, load_data(run.train, model)[0], CPU)
    stored, found = load_model(directory).state_dict(), trainer.module.state_dict()
    assert torch.equal(found["head.weight"], stored["head.weight"][[1, 0]])
    assert torch.equal(found["head.bias"], stored["head.bias"][[1, 0]])
    rest = [key for key in stored if not key.startswith("head.")]
    assert all(torch.equal(found[key], stored[key]) for key in rest)


def test_a_head_of_other_classes_is_refused_or_starts_anew(tiny, folder, tmp_path):
    model = tiny.with_values(num_classes=2)
    directory = saved(tmp_path / "init", model, ("cat", "cow"))
    run = run_of(model, folder, init=str(directory))
    loader, _ = load_data(run.train, model)
    expected = "'cow' is only in the first, 'dog' is only in the second; .*train.reset_head = true"
    with pytest.raises(SretError, match=expected) as refused:
        Trainer(run, loader, CPU)
    assert refused.value.code == 5
    fresh = run_of(model, folder, init=str(directory), reset_head=True)
    stored = load_model(directory).state_dict()
    found = Trainer(fresh, loader, CPU).module.state_dict()
    assert not torch.equal(found["head.weight"], stored["head.weight"])
    assert torch.equal(found["pos_embed"], stored["pos_embed"])
    with pytest.raises(SretError, match="reset_head = true needs weights to start from"):
        TrainSpec(reset_head=True)


def test_later_fields_leave_the_ids_of_runs_as_they_were():
    nano = PRESETS["nano"]
    assert Run("s", "n", nano, TrainSpec()).run_id == "9647993dc4"
    spec = TrainSpec(dataset="hfds", data_dir="x", init="y")
    assert Run("s", "n", nano, spec, contents=Contents()).run_id == "4691caf5ed"
    for values in ({"label_column": "fine"}, {"reset_head": True}):
        other = Run("s", "n", nano, spec.with_values(**values), contents=Contents())
        assert other.run_id != "4691caf5ed"


def test_numbers_alone_are_no_names(tiny, tmp_path, capsys):
    spec = data_spec("synthetic", teacher=str(saved(tmp_path / "teacher", tiny, "abcdefghij")))
    loader, _ = load_data(spec, tiny)
    assert loader.class_list.names is None
    assert capsys.readouterr().err == ""
    Teacher(spec, tiny, CPU, loader.class_list)
    assert capsys.readouterr().err == (
        "sret: the names of the classes of the training images are not known: only the number of "
        f"classes can be compared with the teacher {tmp_path}/teacher\n"
    )
