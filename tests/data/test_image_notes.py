"""Pillow's warnings, told as notes that name the image: never as Python's."""

import io
import tarfile
import warnings

import pytest
from PIL import Image

from sret_cli.data import image_notes
from sret_cli.data.image_notes import noted, pillow_warnings, show_warnings, without_notes
from sret_cli.data.prepare import load_data
from sret_cli.runtime.errors import notes_shown_by
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.train import TrainSpec

NANO = PRESETS["nano"].with_values(img_size=16, num_classes=2)
TRANSPARENT = (
    "Palette images with Transparency expressed in bytes should be converted to RGBA images"
)


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(image_notes, "_shown", set())


def write_transparent(path):
    """A palette image that is transparent by a part."""
    Image.new("P", (20, 20)).save(path, "PNG", transparency=bytes([99]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_warning_names_the_image_once_wherever_it_was_decoded(folder, workers, capfd):
    for path in (folder / "train" / "cat" / "3.png", folder / "test" / "dog" / "0.png"):
        path.with_suffix(".jpg").unlink()
        write_transparent(path)
    spec = TrainSpec(dataset="folder", data_dir=str(folder), batch_size=4)
    said = []
    with notes_shown_by(said.append), warnings.catch_warnings():
        warnings.simplefilter("error")
        for loader in load_data(spec, NANO, workers):
            for epoch in (0, 1):
                assert sum(len(images) for images, _ in loader.epoch(epoch)) == 16
    assert said == [
        f"{folder}/train/cat/3.png: {TRANSPARENT}",
        f"{folder}/test/dog/0.png: {TRANSPARENT}",
    ]
    assert capfd.readouterr() == ("", "")


def test_warnings_of_shards_name_the_shard_and_the_sample(tmp_path, capfd):
    pytest.importorskip("webdataset")
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for number in range(4):
                file = io.BytesIO()
                write_transparent(file)
                for suffix, data in (("png", file.getvalue()), ("cls", b"%d" % (number % 2))):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    spec = TrainSpec(dataset="wds", data_dir=str(tmp_path), batch_size=4)
    said = []
    with notes_shown_by(said.append):
        list(load_data(spec, NANO)[1].epoch(0))
    own = [line for line in said if "Palette" in line]
    assert own == [f"{tmp_path}/test-0.tar, {number}: {TRANSPARENT}" for number in range(4)]
    assert "Warning" not in capfd.readouterr().err


def test_of_many_images_ten_are_named_and_then_it_is_said_where_to_find_the_others(capsys):
    for number in range(99):
        show_warnings([f"{number}.png: odd", f"{number}.png: odd"])
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "sret: 0.png: odd"
    assert said[9] == "sret: 9.png: odd"
    assert said[10:] == ["sret: more images have such faults; `sret data check DIR` lists them all"]


def test_warnings_of_other_packages_are_left_to_python():
    with pytest.warns(FutureWarning, match="ours"), pillow_warnings() as texts:
        warnings.warn("ours", FutureWarning, stacklevel=1)
    assert texts == []


def test_what_is_made_without_a_warning_is_handed_on_as_it_is():
    made = object()
    assert noted(lambda: made, lambda: "name") is made
    assert without_notes([made]) == ([made], [])
