import csv
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sret_cli.data.sources import train_folder
from sret_cli.runtime.errors import SretError


@pytest.fixture
def folder(tmp_path):
    """Three different 8x6 images in each of two classes, in train/ and val/."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(3):
                pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{number}.png")
    return tmp_path / "pets"


def rgb_of_16_bits():
    """The bytes of a PNG file of two grey pixels of 16 bits in each of three channels."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1) + 12 * b"\x90")),
        (b"IEND", b""),
    )
    crcs = (struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
    chunks = (
        struct.pack(">I", len(data)) + name + data + crc
        for (name, data), crc in zip(parts, crcs, strict=True)
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def check(sret, folder, code=0):
    exit_code, out, err = sret("data", "check", folder, "--json")
    assert exit_code == code
    return json.loads(out), err


def test_a_clean_folder_is_listed_with_its_sizes_and_hashes(sret, folder):
    code, out, err = sret("data", "check", folder)
    assert code == 0
    assert out.startswith("train: 6 images of 2 classes, 0.0 MB\nval: 6 images of 2 classes")
    assert err == "wrote pets.csv\n"
    (folder / "train" / "cat" / "0.png").write_bytes((folder / "val/cat/0.png").read_bytes())
    sret("data", "check", folder, "--manifest", "list.csv", "--workers", "1")
    with open("list.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    first = lines[0]
    assert (first["split"], first["class_name"]) == ("train", "cat")
    assert (first["width"], first["height"], first["mode"]) == ("8", "6", "RGB")
    assert len(first["sha256"]) == 64
    assert first["sha256"] == lines[6]["sha256"]
    assert first["error"] == ""


def test_every_file_that_cannot_be_read_is_named_and_the_exit_code_is_4(sret, folder):
    (folder / "train" / "cat" / "0.png").write_text("no image")
    broken = folder / "val" / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (folder / "val" / "dog" / "notes.txt").write_text("not even called an image")
    found, err = check(sret, folder, code=4)
    assert list(found["unreadable"]) == [
        str(folder / "train" / "cat" / "0.png"),
        str(folder / "val" / "dog" / "2.png"),
    ]
    assert "not an image" in next(iter(found["unreadable"].values()))
    assert err.endswith("sret: 2 of 12 images cannot be read; fix or remove them\n")
    _, out, _ = sret("data", "check", folder)
    assert f"cannot read {broken}" in out


def test_images_in_two_splits_are_found_by_bytes_and_by_pixels(sret, folder):
    train, val = folder / "train" / "cat", folder / "val" / "dog"
    (val / "0.png").write_bytes((train / "0.png").read_bytes())
    Image.open(train / "1.png").save(val / "1.bmp")
    (train / "3.png").write_bytes((train / "2.png").read_bytes())  # in one split: no matter
    found, _ = check(sret, folder)
    assert found["duplicates"] == [
        [str(train / "0.png"), str(val / "0.png")],
        [str(train / "1.png"), str(val / "1.bmp")],
    ]


def test_classes_without_images_in_a_split_are_found(sret, folder):
    for image in (folder / "val" / "dog").iterdir():
        image.unlink()
    found, _ = check(sret, folder)
    assert found["missing_classes"] == {"val": ["dog"]}


def test_empty_class_folders_are_found_as_training_refuses_them(sret, folder):
    for split in ("train", "val"):
        (folder / split / "cow").mkdir()
    found, _ = check(sret, folder)
    assert found["missing_classes"] == {"train": ["cow"], "val": ["cow"]}
    with pytest.raises(SretError, match="no images of class 'cow'"):
        train_folder(folder)


def test_files_that_training_leaves_out_are_counted_by_extension(sret, folder):
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/notes", "dog/._0.png", "list.txt"):
        (folder / "train" / name).write_text("no image")
    (folder / "val" / "dog" / "2.png").rename(folder / "val" / "dog" / "2.jfif")
    found, _ = check(sret, folder)
    assert found["ignored"] == {".heic": 2, ".txt": 1, "hidden": 1, "no extension": 1}
    assert found["splits"]["val"]["images"] == 6
    _, out, _ = sret("data", "check", folder)
    assert "files that training leaves out: 2 .heic, 1 .txt, 1 hidden, 1 no extension\n" in out


def test_links_to_folders_above_or_seen_before_multiply_no_images(sret, folder, tmp_path):
    cat = folder / "train" / "cat"
    (tmp_path / "more").mkdir()
    (cat / "0.png").rename(tmp_path / "more" / "0.png")
    for name, target in (("self", "."), ("up", ".."), ("a", tmp_path / "more"), ("b", "a")):
        (cat / name).symlink_to(target)
    found, _ = check(sret, folder)
    assert found["splits"]["train"]["images"] == 6
    source = train_folder(folder)
    names = [path.removeprefix(f"{cat}/") for path in source.images.images]
    assert names[:3] == ["1.png", "2.png", "a/0.png"]
    assert len(source) == 6


def test_names_that_are_not_utf_8_are_written_as_they_are(sret, folder):
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / name)
    (folder / "train" / name / "0.png").write_text("no image")
    code, out, _ = sret("data", "check", folder, "--manifest", "list.csv")
    assert code == 4
    assert r"caf\udce9/0.png" in out
    with open("list.csv", newline="", errors="surrogateescape") as file:
        assert next(csv.DictReader(file))["class_name"] == name
    check(sret, folder, code=4)


def test_images_of_odd_kinds_are_listed(sret, folder):
    cat = folder / "train" / "cat"
    Image.new("CMYK", (8, 8)).save(cat / "cmyk.jpg")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(cat / "deep.png")
    Image.new("RGBA", (8, 8)).save(cat / "alpha.png")
    Image.new("P", (8, 8)).save(cat / "palette.png")
    frames = [Image.new("L", (8, 8), level) for level in (0, 99)]
    frames[0].save(cat / "moving.gif", save_all=True, append_images=frames[1:])
    (cat / "deep-rgb.png").write_bytes(rgb_of_16_bits())
    found, _ = check(sret, folder)
    names = {kind: [p.rpartition("/")[2] for p in paths] for kind, paths in found["odd"].items()}
    assert names == {
        "alpha": ["alpha.png"],
        "CMYK": ["cmyk.jpg"],
        "16 bits or more": ["deep-rgb.png", "deep.png"],
        "several frames": ["moving.gif"],
        "palette": ["moving.gif", "palette.png"],
    }


def test_what_training_refuses_as_too_large_the_check_refuses(sret, folder, monkeypatch):
    Image.new("L", (100, 100)).save(folder / "train" / "cat" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    found, _ = check(sret, folder, code=4)
    assert "exceeds limit of" in found["unreadable"][str(folder / "train/cat/large.png")]


def test_a_folder_without_splits_is_one_split(sret, folder):
    found, _ = check(sret, folder / "train")
    assert found["splits"] == {
        "": {"images": 6, "classes": 2, "bytes": found["splits"][""]["bytes"]}
    }


def test_images_of_each_class_are_counted_and_classes_far_apart_are_told(sret, folder):
    for number in range(31):
        name = folder / "train" / "cat" / f"more-{number}.png"
        name.write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    (folder / "val" / "cow").mkdir()
    found, _ = check(sret, folder)
    assert found["images_by_class"] == {
        "train": {"cat": 34, "cow": 0, "dog": 3},
        "val": {"cat": 3, "cow": 0, "dog": 3},
    }
    assert found["imbalanced"] == {"train": {"largest": ["cat", 34], "smallest": ["dog", 3]}}
    _, out, _ = sret("data", "check", folder)
    assert (
        "images of each class, the fewest first\n  cow: 0 in train, 0 in val\n"
        "  dog: 3 in train, 3 in val\n  cat: 34 in train, 3 in val\n"
        "train: classes are more than ten times apart: 34 images of cat, 3 of dog\n"
    ) in out
    for number in range(30, 26, -1):
        (folder / "train" / "cat" / f"more-{number}.png").unlink()
    assert check(sret, folder)[0]["imbalanced"] == {}  # 30 images are ten times as many


def test_exif_orientations_are_listed_but_of_images_that_pillow_turns(sret, folder):
    cat, dog = folder / "train" / "cat", folder / "val" / "dog"
    for path, value in ((cat / "a.jpg", 6), (cat / "b.jpg", 1), (dog / "c.png", 6)):
        exif = Image.Exif()
        exif[0x0112] = value
        Image.new("RGB", (8, 6)).save(path, exif=exif)
    exif[0x0112] = 3
    Image.new("RGB", (8, 6)).save(cat / "d.webp", exif=exif)
    Image.new("RGB", (8, 6)).save(cat / "e.tif", tiffinfo={0x0112: 6})
    exif[0x0112] = 77  # which is none
    Image.new("RGB", (8, 6)).save(cat / "f.jpg", exif=exif)
    found, _ = check(sret, folder)
    assert found["orientations"] == {
        "3": [str(cat / "d.webp")],
        "6": [str(cat / "a.jpg"), str(dog / "c.png")],
    }
    _, out, _ = sret("data", "check", folder)
    assert (
        "EXIF orientation other than 1: 3 images (1 with 3, 2 with 6); training takes them as they "
        f"are stored, not turned\n  {cat}/d.webp\n  {cat}/a.jpg\n  {dog}/c.png\n"
    ) in out
    with open("pets.csv", newline="") as file:
        lines = {os.path.basename(line["path"]): line for line in csv.DictReader(file)}
    assert lines["a.jpg"]["orientation"] == "6"
    assert lines["e.tif"]["orientation"] == ""
    assert train_folder(folder).open(3, "RGB")[0].size == (8, 6)  # cat/a.jpg, not turned


def test_warnings_of_pillow_name_the_image_and_are_no_warnings_of_python(sret, folder):
    cat = folder / "train" / "cat"
    Image.new("P", (8, 8)).save(cat / "palette.png", transparency=bytes([99]))
    cut = b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01"  # nine entries, of which none is there
    Image.new("RGB", (8, 6)).save(cat / "cut.jpg", exif=cut)
    found, _ = check(sret, folder)
    assert list(found["warnings"]) == [str(cat / "cut.jpg"), str(cat / "palette.png")]
    assert "Corrupt EXIF data" in found["warnings"][str(cat / "cut.jpg")]
    assert found["warnings"][str(cat / "palette.png")].startswith("Palette images with Transp")
    assert found["unreadable"] == {}
    _, out, err = sret("data", "check", folder)
    assert "Pillow warns of 2 images\n" in out
    assert f"  {cat}/palette.png: Palette images with Transparency" in out
    assert "Warning" not in err


def test_a_manifest_of_fewer_columns_is_replaced(sret, folder, tmp_path):
    sret("data", "check", folder)
    own = tmp_path / "pets.csv"
    heading = own.read_text().splitlines()[0]
    assert heading.endswith(",pixels_sha256,error,orientation,warnings")
    own.write_text(heading.removesuffix(",orientation,warnings") + "\n")
    assert sret("data", "check", folder)[0] == 0
    assert own.read_text().splitlines()[0] == heading
    own.write_text("path,split\n")
    assert sret("data", "check", folder)[0] == 2


def test_no_folder_and_no_images_are_data_errors(sret, tmp_path):
    code, _, err = sret("data", "check", "nowhere")
    assert (code, err) == (
        4,
        "sret: no folder nowhere; --data-dir names one with train/ and test/\n",
    )
    (tmp_path / "empty").mkdir()
    code, _, err = sret("data", "check", "empty")
    assert code == 4
    assert "no images in empty" in err


def test_a_manifest_is_replaced_and_any_other_file_is_not(sret, folder, tmp_path):
    own = tmp_path / "pets.csv"
    own.write_text("name,age\nRex,3\n")
    code, out, err = sret("data", "check", folder)
    assert (code, out, own.read_text()) == (2, "", "name,age\nRex,3\n")
    assert err.endswith(
        "pets.csv is there and is no manifest of `sret data check`; choose another --manifest\n"
    )
    own.unlink()
    for count in (12, 11):
        assert sret("data", "check", folder)[0] == 0
        assert len(own.read_text().splitlines()) == 1 + count
        (folder / "train/cat/0.png").unlink(missing_ok=True)
