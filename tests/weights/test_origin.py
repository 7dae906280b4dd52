"""What an export says of where its model comes from, and exports of backbones."""

import json
import os

import onnxruntime
import pytest
import torch
from helpers import (
    FAMILIES,
    backbone_images,
    backbone_model,
    filled,
    logits,
    saved,
    small,
    write_export,
)
from safetensors import safe_open

import sret_cli
from sret_cli.model.backbone import build_backbone
from sret_cli.runtime.errors import SretError
from sret_cli.spec.run import run_directory
from sret_cli.weights.export import run_file, write_torch_export
from sret_cli.weights.origin import Origin, safe_name
from sret_cli.weights.program import to_program

QUICK = ("--epochs", 1, "--batch-size", 512, "--set", "model.embed_dims=[8, 16, 32]")
QUICK += ("--set", "model.num_heads=[1, 2, 4]", "--set", "train.warmup_epochs=0")


# The export of the graph takes long where blocks have masks, or many operators.
SLOW = [(family, "onnx") for family in FAMILIES if family != "vit"] + [("swin", "torch-export")]


def metadata(directory):
    """What the file in a directory says of itself, of whichever format it is."""
    if (directory / "model.onnx").exists():
        session = onnxruntime.InferenceSession(directory / "model.onnx")
        return session.get_modelmeta().custom_metadata_map
    if (directory / "model.pt2").exists():
        found = {"metadata.json": ""}
        torch.export.load(directory / "model.pt2", extra_files=found)
        return json.loads(found["metadata.json"])
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert list(file.metadata()) == ["sret"]
        return json.loads(file.metadata()["sret"])


@pytest.fixture
def run(sret, folder):
    """A run on two classes, cat and dog, with averaged weights; its name has spaces."""
    (folder / "two pets.toml").write_text(
        '[model]\npreset = "nano"\nrecursions = 1\nimg_size = 16\nembed_dims = [8, 16, 32]\n'
        "num_heads = [1, 2, 4]\n[train]\ndata_dir = '.'\nepochs = 1\nbatch_size = 16\n"
        'model_ema_decay = 0.5\nwarmup_epochs = 0\n[[runs]]\nname = "a/b  c: é"\n'
    )
    code, out, err = sret("train", "two pets.toml", "--workers", 0, "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "torch-export", "onnx"])
def test_an_export_carries_its_run_and_its_classes(sret, run, tmp_path, to):
    code, out, err = sret("export", "--to", to)
    assert code == 0
    assert err.splitlines()[0] == (
        f"took the newest run, runs/two pets/{run['run_id']} (a/b  c: é, of {run['started_at']})"
    )
    (name,) = os.listdir("exports")
    assert name == f"a-b-c-{run['run_id']}-{to}"
    found = metadata(tmp_path / "exports" / name)
    assert json.loads(found["classes"]) == ["cat", "dog"]
    assert (found["run_id"], found["study"]) == (run["run_id"], "two pets")
    assert (found["name"], found["weights"]) == ("a/b  c: é", "as trained")
    assert (found["img_size"], found["num_classes"]) == ("16", "2")
    assert json.loads(found["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(found["std"]) == [0.229, 0.224, 0.225]
    assert json.loads(found["model"])["embed_dims"] == [8, 16, 32]
    card = (tmp_path / "exports" / name / "README.md").read_text(encoding="utf-8")
    for line in (
        *("# a/b c: é", '["cat", "dog"]', f"| Top-1 (%) | {run['top1_percent']:.2f} |"),
        f"These are the weights of the run `{run['run_id']}` of the study `two pets`.",
    ):
        assert line in card
    code, out, err = sret("export", "--to", to)
    assert (code, out) == (2, "")
    assert err.splitlines()[1] == (f"sret: exports/{name} already exists; choose another directory")


def test_averaged_weights_are_exported_as_such_and_evaluated_from_the_export(sret, run, tmp_path):
    where = f"runs/two pets/{run['run_id']}/ema"
    assert sret("export", where)[0] == 0
    exported = tmp_path / "exports" / f"a-b-c-{run['run_id']}-ema-safetensors"
    assert metadata(exported)["weights"] == "averaged"
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert f"These are the averaged weights of the run `{run['run_id']}`" in card
    assert f"| Top-1 (%) | {run['ema_top1_percent']:.2f} |" in card
    rows = []
    for arguments in ((where,), (exported, "--data-dir", ".")):
        code, out, _ = sret("eval", *arguments, "--workers", 0, "--json")
        assert code == 0
        rows += json.loads(out)
    assert rows[0] == rows[1]
    assert (rows[0]["run_id"], rows[0]["averaged"]) == (run["run_id"], True)
    assert rows[0]["test_loss"] == run["ema_test_loss"]


def test_an_export_names_no_path_of_the_machine_and_needs_none(sret, run, tmp_path):
    assert sret("export", "--out", "first")[0] == 0
    text = (tmp_path / "first" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["train"] == {
        "dataset": "folder",
        "interpolation": "bicubic",
        "crop_pct": 0.875,
    }
    code, out, err = sret("eval", "first")
    assert (code, out) == (3, "")
    assert err == "sret: dataset = 'folder' needs a folder of images; name it with --data-dir\n"
    assert sret("export", "first", "--out", "second")[0] == 0
    assert metadata(tmp_path / "second") == metadata(tmp_path / "first")
    teacher = ("--set", "train.teacher=first", "--data-dir", ".", "--img-size", 16, "--slices", 1)
    code, _, err = sret("train", *teacher, *QUICK, "--workers", 0)
    assert code == 0, err


def test_a_run_is_known_by_its_directory_wherever_a_user_stands(sret, run, monkeypatch):
    monkeypatch.chdir(f"runs/two pets/{run['run_id']}")
    code, out, err = sret("eval", ".", "--json", "--data-dir", "../../..", "--workers", 0)
    assert code == 0
    assert "newest" not in err
    assert json.loads(out)[0]["run_id"] == run["run_id"]
    assert run_directory("ema").name == run["run_id"]


def test_a_run_on_digits_and_a_converted_model_say_how_images_are_prepared(sret, tmp_path):
    assert sret("train", *QUICK)[0] == 0
    assert sret("export", "--out", "digits")[0] == 0
    found = metadata(tmp_path / "digits")
    assert json.loads(found["classes"]) == list("0123456789")
    assert json.loads(found["mean"]) == [0.305, 0.305, 0.305]
    saved(filled(small()), tmp_path / "x.pth")
    heads = ("--set", "model.num_heads=[1, 2, 4]")
    assert sret("convert", "x.pth", "--out", "ours", *heads)[0] == 0
    assert sret("export", "ours", "--out", "theirs")[0] == 0
    found = metadata(tmp_path / "theirs")
    assert json.loads(found["source"])["file"] == "x.pth"
    assert json.loads(found["mean"]) == [0.485, 0.456, 0.406]
    assert not {"run_id", "classes", "weights"} & found.keys()
    assert "Converted from the file `x.pth`" in (tmp_path / "theirs" / "README.md").read_text()


def test_an_untrained_model_says_no_more_than_is_known(sret, tmp_path):
    assert sret("export", "--preset", "nano", "--twin", "layers")[0] == 0
    assert os.listdir("exports") == ["nano-twin-layers-safetensors"]
    found = metadata(tmp_path / "exports" / "nano-twin-layers-safetensors")
    assert list(found) == [
        *("sret_version", "name", "model", "img_size", "in_chans", "num_classes"),
    ]


def test_names_of_directories_have_plain_characters_alone():
    assert safe_name("deep twin layers") == "deep-twin-layers"
    assert safe_name("../..//é a\n:b*?.") == "a-b"
    assert safe_name("v1.2_x") == "v1.2_x"
    assert len(safe_name("x" * 500)) == 80
    assert Origin("模型").directory_name == "model"
    assert Origin("模型", run_id="0123456789").directory_name == "0123456789"
    names = {Origin("a b", run_id=run_id).directory_name for run_id in ("0" * 10, "1" * 10)}
    assert names == {"a-b-0000000000", "a-b-1111111111"}


def tied(family, **values):
    """A small timm model with two recursions and tied blocks."""
    share = 2 if family in ("pit", "swin") else "all"
    return backbone_model(family, recursions=2, share=share, nll="per_block", **values).eval()


@pytest.mark.parametrize(
    ("family", "to"),
    [
        *(("vit", "safetensors"), ("vit", "torch-export"), ("vit", "onnx")),
        *(pytest.param(f, to, marks=pytest.mark.slow) for f, to in SLOW),
    ],
)
def test_a_recursive_backbone_is_exported_with_its_tied_weights_once(tmp_path, family, to):
    model = tied(family)
    written = write_export(model, to, tmp_path / "out", Origin("pets", classes=("cat", "dog")))
    assert written.logits_difference < 1e-5
    torch.testing.assert_close(
        run_file(to, written.file, backbone_images()), logits(model), atol=1e-4, rtol=0
    )
    assert json.loads(metadata(tmp_path / "out")["model"])["backbone"] == f"{family}_small"
    assert os.path.dirname(sret_cli.__file__).encode() not in written.file.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The model `{family}_small` of [timm]" in card
    assert "made recursive: each block is passed 2 times" in card


def test_the_weights_of_a_tied_backbone_do_not_grow_with_its_layers(tmp_path):
    sizes = []
    for recursions, share in ((1, 1), (1, "all")):
        torch.manual_seed(0)
        wide = backbone_model("vit", recursions=recursions, share=share, img_size=32)
        write_torch_export(wide, tmp_path / "x.pt2")
        sizes.append((tmp_path / "x.pt2").stat().st_size)
    block = sum(p.numel() for p in backbone_model("vit").blocks[0].parameters())
    assert sizes[0] - sizes[1] == pytest.approx(3 * 4 * block, abs=12_000)


@pytest.mark.slow
def test_an_untouched_backbone_is_exported_by_flags(sret, tmp_path):
    flags = ("--set", "model.backbone=vit_small", "--set", "model.img_size=32")
    code, out, _ = sret("export", *flags, "--to", "onnx", "--num-classes", 10)
    assert code == 0
    (name,) = os.listdir("exports")
    assert name == "vit_small-onnx"
    card = (tmp_path / "exports" / name / "README.md").read_text()
    assert "The model `vit_small` of [timm]" in card
    assert "license:" not in card
    assert "shen2022sliced" not in card


def test_a_backbone_that_torch_cannot_export_is_refused_in_one_line(tmp_path, monkeypatch):
    model = backbone_model("vit")
    forward = model.forward_head
    monkeypatch.setattr(
        model, "forward_head", lambda x: forward(x) if x.sum() > 0 else -forward(x), raising=True
    )
    with pytest.raises(SretError, match="vit_small cannot be written as a program of torch.export"):
        write_export(model, "torch-export", tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_the_copy_for_an_export_leaves_the_model_as_it_is(tmp_path):
    model = tied("vit")
    before = list(model.state_dict())
    to_program(model)
    assert list(model.state_dict()) == before == list(build_backbone(model.spec).state_dict())
