"""The same images are the same run wherever they lie, and others are not."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import stop_at
from PIL import Image
from rich.console import Console

from sret_cli.data import readers
from sret_cli.data.fingerprint import Images
from sret_cli.data.sources import Source, TorchvisionImages, train_folder
from sret_cli.model.sret import build_model
from sret_cli.report.groups import group_seeds
from sret_cli.runtime.errors import SretError
from sret_cli.runtime.progress import Progress
from sret_cli.spec.contents import Contents
from sret_cli.spec.options import RunOptions
from sret_cli.spec.run import Run
from sret_cli.spec.train import TrainSpec
from sret_cli.study.axes import varying_fields
from sret_cli.study.file import study_from_tables
from sret_cli.study.resolve import continue_run
from sret_cli.study.work import run_study
from sret_cli.training.identify import Identifier, find_splits
from sret_cli.training.session import train
from sret_cli.weights.store import save_model

FLAGS = ("--preset", "nano", "--img-size", 16, "--workers", 0, "--batch-size", 4, "--epochs", 2)
FLAGS += ("--set", "model.embed_dims=[8, 16, 32]", "--set", "model.slices=[4, 2, 1]")
FLAGS += ("--set", "train.warmup_epochs=0", "--set", "model.recursive_slices=[2, 2, 1]")


@pytest.fixture
def images(folder, tmp_path):
    """The images of `folder`, in a folder of their own."""
    (tmp_path / "images").mkdir()
    for split in ("train", "test"):
        shutil.move(folder / split, tmp_path / "images" / split)
    return tmp_path / "images"


@pytest.fixture
def many(tmp_path):
    """300 files of 3 bytes, which are no images, in each of two classes to train on."""
    for name in ("cat", "dog"):
        (tmp_path / "many" / "train" / name).mkdir(parents=True)
        for number in range(300):
            (tmp_path / "many" / "train" / name / f"{number}.png").write_bytes(b"%3d" % number)
    return tmp_path / "many"


def run_of(tiny, data_dir, **values):
    spec = {"data_dir": str(data_dir), "batch_size": 4, "epochs": 2, "warmup_epochs": 0, **values}
    return Run("test", "tiny", tiny.with_values(num_classes=2), TrainSpec(**spec))


def id_of(run):
    return Identifier().identify(run).run_id


def training_images(data_dir):
    return Images(train_folder(data_dir), str(data_dir))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-10 % len(data)] ^= 1
    path.write_bytes(data)


def rows_of(out):
    return json.loads(out)


def test_a_fingerprint_is_of_names_classes_sizes_and_bytes(tmp_path):
    for name, data in (("cat/1.png", b"one"), ("dog/2.png", b"two"), ("dog/10.png", b"three")):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(data)
    found = training_images(tmp_path).fingerprint(0)
    # By sha256sum of the names, sizes and sums, with zero bytes between and a line end after each.
    assert found.classes["cat"] == [1, "a86b8cd80a2f1db1", None]
    assert found.files == "415d84b84b27324c1e339c1d9caf136e308b294f2a845f25eff8efa0cf76708e"
    assert found.sample == "8698aa915301998adc952914b48d324fa4a7ceaa6c86dd62846ae800d80ed776"
    three = "8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f"
    assert found.sampled["dog/10.png"] == [5, three]
    assert found.manifest is None


def test_one_folder_is_one_run_by_whichever_path(tiny, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = id_of(run_of(tiny, "images"))
    (tmp_path / "link").symlink_to("images")
    shutil.copytree(images, tmp_path / "elsewhere" / "copy")
    shutil.move(tmp_path / "elsewhere" / "copy" / "test", tmp_path / "elsewhere" / "copy" / "val")
    for place in (images, "link", "elsewhere/copy", "images/../images"):
        assert id_of(run_of(tiny, place)) == here
    flip_a_bit(images / "train" / "cat" / "3.jpg")
    assert id_of(run_of(tiny, "images")) != here
    (images / "test" / "cat" / "3.jpg").rename(images / "test" / "cat" / "9.jpg")
    assert len({here, id_of(run_of(tiny, "images")), id_of(run_of(tiny, "link", seed=1))}) == 3


@pytest.mark.slow
def test_a_requeued_command_goes_on_where_its_images_lie_now(sret, tiny, images, tmp_path):
    code, out, err = sret("train", "--data-dir", images, *FLAGS[:-9], 1, *FLAGS[-8:], "--json")
    assert code == 0, err
    (row,) = rows_of(out)
    config = json.loads(Path("runs", "train", row["run_id"], "config.json").read_text())
    run = continue_run(Path("runs", "train", row["run_id"]), 2)
    run = Run("train", run.name, run.model, run.train)
    run = Identifier().identify(run)
    with pytest.raises(SystemExit):
        train(run, run.directory(Path("runs")), progress=Progress(on_step=stop_at(3)))
    shutil.move(images, tmp_path / "scratch")
    code, out, err = sret("train", "--data-dir", tmp_path / "scratch", *FLAGS, "--json")
    assert code == 0, err
    (row,) = rows_of(out)
    directory = Path("runs", "train", row["run_id"])
    assert directory == run.directory(Path("runs"))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 9))
    assert json.loads((directory / "config.json").read_text())["train"]["data_dir"] == str(
        tmp_path / "scratch"
    )
    assert row["train.data_dir"] == str(tmp_path / "scratch")
    assert row["data_files_sha256"] == config["contents"]["data_files_sha256"]


@pytest.mark.slow
def test_a_run_goes_on_by_resume_with_its_images_elsewhere_but_not_with_others(
    sret, tiny, images, tmp_path
):
    run = Identifier().identify(run_of(tiny, images))
    directory = run.directory(Path("runs"))
    with pytest.raises(SystemExit):
        train(run, directory, progress=Progress(on_step=stop_at(3)))
    shutil.copytree(images, tmp_path / "others")
    flip_a_bit(tmp_path / "others" / "train" / "dog" / "5.jpg")
    shutil.move(images, tmp_path / "moved")
    config = (directory / "config.json").read_bytes()
    resume = ("train", "--resume", directory, "--workers", 0)
    code, _, err = sret(*resume, "--data-dir", tmp_path / "others")
    assert (code, "(train/dog/5.jpg has other bytes)" in err) == (5, True)
    assert (directory / "config.json").read_bytes() == config
    code, _, err = sret(*resume)
    assert (code, err.startswith(f"sret: no folder {images}")) == (4, True), err
    code, _, err = sret(*resume, "--dataset", "tar", "--data-dir", tmp_path / "moved")
    assert (code, "leave out dataset, data_dir" in err) == (2, True)
    code, _, err = sret(*resume, "--set", "train.data_dir=" + str(tmp_path / "moved"), "--seed", 1)
    assert (code, "leave out seed" in err) == (2, True)
    code, out, err = sret(*resume, "--data-dir", tmp_path / "moved", "--json")
    assert code == 0, err
    shutil.rmtree(tmp_path / "moved")
    assert rows_of(sret(*resume, "--json")[1]) == rows_of(out)
    assert sret("report", directory)[0] == 0


def test_other_images_at_the_same_place_are_another_run_and_it_is_said(sret, images):
    code, out, _ = sret("train", "--data-dir", images, *FLAGS, "--json")
    (first,) = rows_of(out)
    flip_a_bit(images / "test" / "dog" / "0.jpg")
    code, out, err = sret("train", "--data-dir", images, *FLAGS, "--json")
    (second,) = rows_of(out)
    assert first["run_id"] != second["run_id"]
    assert err.splitlines()[0] == (
        f"runs/train/{first['run_id']} has the same settings, but other images: "
        f"{second['run_id']} is a new run and shares nothing with it"
    )
    assert [len(group.rows) for group in group_seeds([first, second])] == [1, 1]
    assert sret("train", "--data-dir", images, *FLAGS)[2].count("shares nothing") == 0


def test_rows_of_one_set_of_images_are_seeds_of_one_model_wherever_they_lay():
    sums = {"data_files_sha256": "f", "train.data_dir": "here"}
    rows = [
        {"layers": 8, "train.seed": seed, "data_sample_sha256": f"s{seed}", **sums, **values}
        for seed, values in ((0, {}), (1, {"train.data_dir": "there"}))
    ]
    assert varying_fields(rows) == []
    others = [*rows, {**rows[0], "data_files_sha256": "g", "data_sample_sha256": "t"}]
    assert varying_fields(others) == ["data_files_sha256"]
    named = [*rows, {**rows[0], "data_files_sha256": "g", "train.data_dir": "other"}]
    named[1]["train.data_dir"] = "here"
    assert varying_fields(named) == ["train.data_dir"]


def test_the_bytes_of_256_files_are_compared_that_the_seed_chooses(many):
    first, second = (training_images(many).fingerprint(seed) for seed in (0, 1))
    assert len(first.sampled) == len(second.sampled) == 256
    assert first.files == second.files
    assert first.sampled.keys() != second.sampled.keys()
    names = {f"{name}/{number}.png" for name in ("cat", "dog") for number in range(300)}
    left_out = sorted(names - first.sampled.keys())[0]
    flip_a_bit(many / "train" / left_out)
    assert training_images(many).fingerprint(0) == first
    (many / "train" / left_out).write_bytes(b"four")
    assert training_images(many).fingerprint(0).files != first.files
    (many / "train" / left_out).write_bytes(b"%3d" % int(Path(left_out).stem))
    flip_a_bit(many / "train" / sorted(first.sampled)[7])
    assert training_images(many).difference(first, 0, "train") == (
        f"train/{sorted(first.sampled)[7]} has other bytes"
    )


def checked(sret, data_dir):
    """Writes a manifest next to the images, which nothing can decode here."""
    code, _, err = sret("data", "check", data_dir, "--manifest", data_dir / "checked.csv")
    assert code == 4, err


def test_a_manifest_changes_no_fingerprint_and_its_sums_are_compared(sret, many, tmp_path):
    plain = training_images(many).fingerprint(0)
    unsampled = next(f"cat/{n}.png" for n in range(300) if f"cat/{n}.png" not in plain.sampled)
    (many / "labels.csv").write_text("ImageId,PredictionString\n")
    checked(sret, many)
    listed = training_images(many).fingerprint(0)
    assert (listed.files, listed.sample, plain.manifest) == (plain.files, plain.sample, None)
    assert training_images(many).difference(plain, 0, "train") is None
    shutil.copytree(many, tmp_path / "train" / "cat" / "copy")
    copy = tmp_path / "train" / "cat" / "copy"
    assert training_images(copy).fingerprint(0) == listed
    flip_a_bit(copy / "train" / unsampled)
    assert training_images(copy).fingerprint(0) == listed  # its bytes were not read
    checked(sret, copy)
    assert training_images(copy).difference(listed, 0, "train") == (
        "the manifest has other SHA-256 of images in train/cat than before"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.write_bytes(b"four"),
            "cat/9.png differs .*: it has 4 bytes, not 3",
        ),
        (
            flip_a_bit,
            "cat/9.png differs from .*checked.csv: its SHA-256 differs; put the file",
        ),
        (lambda path: shutil.copy(path, path.with_name("x.png")), "cat/x.png .*: it is not in the"),
    ],
)
def test_an_image_that_is_not_what_the_manifest_says_is_refused(sret, many, change, message):
    checked(sret, many)
    seed = next(s for s in range(9) if "cat/9.png" in training_images(many).fingerprint(s).sampled)
    change(many / "train" / "cat" / "9.png")
    with pytest.raises(SretError, match=message) as refused:
        training_images(many).fingerprint(seed)
    assert refused.value.code == 4


def bitmap(level):
    """An image whose bytes are as many at any level."""
    file = io.BytesIO()
    Image.new("L", (20, 20), level).save(file, "BMP")
    return file.getvalue()


def write_tars(data_dir, level, shards=False):
    data_dir.mkdir()
    for split in ("train-0", "val-0") if shards else ("train", "val"):
        with tarfile.open(data_dir / f"{split}.tar", "w") as tar:
            for number, (name, shade) in enumerate((("cat", 1), ("dog", level))):
                files = {f"{name}/{number}.png": bitmap(shade)}
                if shards:
                    files = {f"{number}.png": bitmap(shade), f"{number}.cls": str(number).encode()}
                for path, data in files.items():
                    info = tarfile.TarInfo(path)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("dataset", ["tar", "wds"])
def test_images_in_tar_files_and_shards_are_told_apart_by_their_bytes(dataset, tiny, tmp_path):
    if dataset == "wds":
        pytest.importorskip("webdataset")
    ids = []
    for name, level in (("mine", 2), ("moved", 2), ("others", 3)):
        write_tars(tmp_path / name, level, dataset == "wds")
        ids.append(id_of(run_of(tiny, tmp_path / name, dataset=dataset)))
    assert len(bitmap(2)) == len(bitmap(3))
    assert ids[0] == ids[1] != ids[2]
    others = find_splits(dataset, str(tmp_path / "others"))["train"]
    mine = find_splits(dataset, str(tmp_path / "mine"))["train"].fingerprint(0)
    place = "train/train-0.tar of 2 samples" if dataset == "wds" else "train/dog/1.png"
    assert others.difference(mine, 0, "train") == f"{place} has other bytes"


def test_images_of_parquet_files_are_told_apart_wherever_they_lie(tiny, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def write(name, images, targets=(0, 1)):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache of {name}")
        columns = {"image": [{"bytes": b, "path": None} for b in images], "label": targets}
        found = datasets.Dataset.from_dict(columns, features)
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            found.to_parquet(tmp_path / name / f"{split}-00000.parquet")
        return id_of(run_of(tiny, tmp_path / name, dataset="hfds"))

    mine = write("mine", (b"one", b"two"))
    assert write("moved", (b"one", b"two")) == mine
    named = TrainSpec(dataset=f"hfds/{tmp_path}/moved", batch_size=4, epochs=2, warmup_epochs=0)
    assert id_of(Run("t", "t", tiny.with_values(num_classes=2), named)) == mine
    others = [
        write("of other bytes", (b"one", b"owt")),
        write("of other sizes", (b"one", b"twice")),
        write("of other classes", (b"one", b"two"), (1, 0)),
    ]
    assert len({mine, *others}) == 4


class Two:
    """A dataset of torchvision's of two images."""

    def __init__(self, **values):
        self.__dict__ |= values

    def __len__(self):
        return 2


def test_torchvisions_images_are_told_apart_by_their_pixels_or_files(tmp_path):
    def sum_of(**values):
        return Images(
            Source("torch/x train", TorchvisionImages(Two(**values)), ("cat", "dog"))
        ).fingerprint(0)

    def files(place, last):
        (tmp_path / place).mkdir()
        for name, data in (("a.png", b"one"), ("b.png", last)):
            (tmp_path / place / name).write_bytes(data)
        return [(str(tmp_path / place / name), n) for n, name in enumerate(("a.png", "b.png"))]

    pixels, other = np.zeros((2, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8)
    mine = sum_of(data=pixels, targets=[0, 1])
    assert sum_of(data=pixels.copy(), targets=[0, 1]) == mine
    listed = sum_of(imgs=files("here", b"two"))
    assert sum_of(imgs=files("there", b"two")) == listed
    others = [
        sum_of(data=other, targets=[0, 1]),
        sum_of(data=pixels, targets=[1, 0]),
        sum_of(imgs=files("other bytes", b"owt")),
        sum_of(imgs=files("other sizes", b"three")),
    ]
    assert len({found.sha256 for found in (mine, listed, *others)}) == 6


def test_weights_and_labels_count_by_what_is_in_them(tiny, tmp_path):
    unsliced_spec = tiny.with_values(slices=(1, 1, 1), recursive_slices=(1, 1, 1))
    weights = build_model(tiny).state_dict()
    for name, spec in (("one", tiny), ("same", tiny), ("unsliced", unsliced_spec)):
        made = build_model(spec)
        made.load_state_dict(weights)
        save_model(made, tmp_path / name)
    save_model(build_model(tiny), tmp_path / "other")

    def ids(field):
        names = ("one", "same", "unsliced", "other")
        specs = [TrainSpec(**{field: str(tmp_path / name)}) for name in names]
        return [id_of(Run("test", "tiny", tiny, spec)) for spec in specs]

    one, same, unsliced, other = ids("teacher")  # sliced or not, the same weights say other things
    assert one == same
    assert len({one, unsliced, other}) == 3
    one, same, unsliced, other = ids("init")
    assert one == same == unsliced != other
    config = tmp_path / "same" / "config.json"
    names = {"classes": [str(number) for number in range(10)]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **names}))
    assert ids("init")[1] != one  # the rows of its head have names
    for name, digest in (("labels", "a" * 64), ("moved", "a" * 64), ("others", "b" * 64)):
        header = {"teacher": "t", "teacher_img_size": 16, "distill_temperature": 1.0, "seed": 0}
        header |= {"precision": "fp32", "images": 1, "images_sha256": "", "num_classes": 10}
        header |= {"in_chans": 1, "img_size": 16, "scale": [0.5, 1], "hflip": 0.0, "crops": 1}
        header |= {"interpolation": "bicubic", "top_k": 1, "sha256": digest}
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.json").write_text(json.dumps(header))
    labels = [TrainSpec(soft_labels=str(tmp_path / name)) for name in ("labels", "moved", "others")]
    one, same, other = (id_of(Run("test", "tiny", tiny, spec)) for spec in labels)
    assert one == same != other
    with pytest.raises(SretError, match="cannot read the weights .*nowhere/model.safetensors"):
        id_of(Run("test", "tiny", tiny, TrainSpec(init=str(tmp_path / "nowhere"))))


def test_a_study_lists_its_images_once(tiny, images, tmp_path, monkeypatch):
    listed = []
    plain = train_folder
    monkeypatch.setattr(readers, "train_folder", lambda path: listed.append(path) or plain(path))
    tables = {
        "model": {**tiny.model_dump(mode="json"), "num_classes": 2},
        "train": {"data_dir": str(images), "batch_size": 16, "epochs": 1, "warmup_epochs": 0},
        "grid": {"train.seed": [0, 1, 2]},
    }
    tables["model"].pop("order")
    found = study_from_tables("seeds", tables)
    outcome = run_study(found, tmp_path / "runs", RunOptions("cpu", 0), Console(quiet=True))
    assert len({row["run_id"] for row in outcome.rows}) == 3
    assert all(row["status"] == "done" for row in outcome.rows)
    assert len(listed) == 1


def test_a_model_is_measured_though_its_labels_are_not_there_and_not_kept(sret, images):
    Path("later.toml").write_text(
        f'[model]\npreset = "nano"\n[train]\ndata_dir = "{images}"\nsoft_labels = "labels"\n'
    )
    code, out, err = sret("profile", "later.toml", "--json")
    assert (code, rows_of(out)[0]["run_id"]) == (0, None)
    assert "nano: measured and not kept: the labels in labels do not exist" in err
    assert not Path("runs").exists()
    assert sret("build", "later.toml")[0] == 0
    assert sret("train", "later.toml")[0] == 4


def test_a_run_of_an_earlier_version_is_refused_in_one_line(sret, tiny, images):
    run = Identifier().identify(run_of(tiny, images, epochs=1))
    directory = run.directory(Path("runs"))
    train(run, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["contents"]
    (directory / "config.json").write_text(json.dumps(config))
    code, _, err = sret("train", "--resume", directory)
    assert (code, err.count("\n")) == (5, 1)
    assert "does not record which images, weights and labels the run reads" in err


def test_a_run_without_anything_to_read_is_identified_as_it_is(tiny):
    run = Run("test", "tiny", tiny, TrainSpec())
    assert run.is_identified
    assert Identifier().identify(run).contents == Contents()
    assert not run_of(tiny, "nowhere").is_identified
