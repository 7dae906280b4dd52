import json

import pytest
import torch
from helpers import logits

from sret_cli.model.backbone import build_backbone
from sret_cli.runtime.errors import SretError, show_note_once
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.study.file import study_from_tables
from sret_cli.study.resolve import resolve_run
from sret_cli.study.rows import planned_row
from sret_cli.training.evaluate import evaluate_run
from sret_cli.training.session import train
from sret_cli.weights.store import load_model, save_model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"backbone": "deit_tini_patch16_224"},
            "no model 'deit_tini_patch16_224'; the nearest are",
        ),
        ({"backbone": "hf-hub:someone/something"}, "has no model 'hf-hub:someone/something'"),
        ({"backbone": "vit_tiny_patch16_224.no"}, "no weights 'no' for it; leave .no out"),
        ({"backbone": "vit_small", "share": "some"}, "share = 'some': give a number"),
        ({"backbone": "vit_small", "share": 0}, "share = 0: give a number"),
        ({"backbone": "vit_small", "recursions": 0}, "recursions = 0"),
        ({"backbone": "vit_small", "nll": "each"}, "nll = 'each'"),
        ({"backbone": 3}, "backbone = 3"),
        (
            {"backbone": "vit_small", "timm_args": {"patchsize": 8}},
            "timm_args.patchsize: vit_small takes no such argument; did you mean 'patch_size'",
        ),
        (
            {"backbone": "deit_small", "timm_args": {"depth": 2, "pach_size": 8}},
            "timm_args.pach_size: deit_small takes no such argument; did you mean 'patch_size'",
        ),
        (
            {"backbone": "naflexvit_base_patch16_gap", "timm_args": {"patchs": 8}},
            "timm_args.patchs: naflexvit_base_patch16_gap takes no such argument",
        ),
        ({"backbone": "vit_small", "timm_args": 3}, "timm_args = 3: write a table"),
        ({"backbone": "vit_small", "timm_args": {"depth": None}}, "timm_args.depth = None: give"),
        (
            {"backbone": "vit_small", "timm_args": {"depth": [1, {"a": 2}]}},
            "timm_args.depth = {'a': 2}: give a number, a string, true or false, or a list",
        ),
        ({"backbone": "vit_small", "timm_args": {"depth": float("nan")}}, "depth = nan: give"),
        ({"backbone": "vit_small", "timm_args": {"img_size": 8}}, "img_size is a field of the"),
        ({"backbone": "vit_small", "timm_args": {"pretrained": True}}, "pretrained is not part of"),
    ],
)
def test_an_invalid_backbone_is_refused_with_the_reason(values, message):
    with pytest.raises(SretError, match=message):
        BackboneSpec(**values)


def test_timm_args_are_passed_to_the_timm_model():
    spec = BackboneSpec(
        backbone="swin_small",
        img_size=32,
        timm_args={"window_size": [2, 2], "patch_size": 2, "qkv_bias": False},
    )
    assert spec.timm_args == (("patch_size", 2), ("qkv_bias", False), ("window_size", (2, 2)))
    assert hash(spec) == hash(BackboneSpec(**spec.model_dump()))
    assert BackboneSpec(**json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    assert spec.with_values(recursions=2).timm_args == spec.timm_args
    model = build_backbone(spec)
    assert model.patch_embed.patch_size == (2, 2)
    assert model.layers[0].blocks[0].window_size == (2, 2)


def test_without_timm_args_a_run_keeps_its_id():
    model = {"backbone": "vit_tiny_patch16_224"}
    run = resolve_run("s", model, None)
    assert run.run_id == "38a274411f"
    assert "timm_args" not in run.spec()["model"]
    assert resolve_run("s", {**model, "timm_args": {}}, None).run_id == run.run_id
    other = resolve_run("s", {**model, "timm_args": {"depth": 2}}, None)
    assert other.run_id != run.run_id
    assert planned_row(other)["model.timm_args.depth"] == 2
    assert "model.timm_args" not in planned_row(other)


def test_timm_args_are_axes_of_a_study():
    tables = {
        "model": {"backbone": "vit_small", "img_size": 16, "timm_args": {"depth": 2}},
        "grid": {"model.timm_args.patch_size": [4, 8]},
        "report": {"x": "model.timm_args.patch_size", "y": ["macs"]},
    }
    runs = study_from_tables("s", tables).runs
    assert [run.model.timm_args for run in runs] == [
        (("depth", 2), ("patch_size", 4)),
        (("depth", 2), ("patch_size", 8)),
    ]
    tables["grid"] = {"model.timm_args.patchsize": [4, 8]}
    with pytest.raises(SretError, match="timm_args.patchsize: vit_small takes no such argument"):
        study_from_tables("s", tables)
    with pytest.raises(SretError, match="unknown key 'model.timm_arg.depth'"):
        study_from_tables("s", {"grid": {"model.timm_arg.depth": [4, 8]}})
    with pytest.raises(SretError, match="timm_args are for timm models; also give a backbone"):
        study_from_tables("s", {"model": {"timm_args": {"depth": 2}}})


def test_an_invalid_value_of_timm_args_is_named_in_the_message():
    spec = BackboneSpec(backbone="vit_small", img_size=32, timm_args={"patch_size": 0})
    with pytest.raises(SretError, match="timm cannot build vit_small .*, patch_size = 0: "):
        build_backbone(spec)


@pytest.mark.slow
def test_a_model_with_timm_args_is_trained_evaluated_and_read_back(sret, tmp_path):
    (tmp_path / "s.toml").write_text(
        """
        [model]
        backbone = "vit_small"
        img_size = 8
        recursions = 2
        [model.timm_args]
        depth = 2
        patch_size = 4
        [train]
        epochs = 1
        warmup_epochs = 0
        batch_size = 480
        """
    )
    assert sret("run", "s.toml")[0] == 0
    (directory,) = (tmp_path / "runs" / "s").glob("??????????")
    row = json.loads((directory / "row.json").read_text())
    assert (row["model.timm_args.depth"], row["model.timm_args.patch_size"]) == (2, 4)
    assert row["layers"] == 4
    model = load_model(directory)
    assert model.patch_embed.grid_size == (2, 2)
    code, out, _ = sret("eval", str(directory), "--json")
    assert code == 0
    assert row["params"] == sum(p.numel() for p in model.parameters())
    flags = ("--set", "model.timm_args.patch_size=4", "--set", "model.timm_args.depth=2")
    code, out, _ = sret("profile", "--backbone", "vit_small", "--img-size", 8, *flags, "--json")
    assert code == 0
    (profiled,) = json.loads(out)
    assert profiled["model.timm_args.depth"] == 2
    code, _, err = sret(
        "profile", "--backbone", "vit_small", *flags[:2], "--set", "model.timm_args={}"
    )
    assert code == 2 and "is the second value of model.timm_args" in err


@pytest.mark.parametrize(
    ("backbone", "img_size", "said"),
    [
        ("deit_tiny_patch16_224", 16, "has 1 token of the image in its blocks"),
        ("vit_small", 8, "has 1 token of the image in its blocks"),
        ("xcit_small", 8, "has 1 token of the image in its blocks"),
        ("cait_small", 16, None),
        ("vit_small", 16, None),
        ("swin_small", 8, "has 1 token of the image in layers.1.blocks"),
        ("pit_small", 16, "of the image in transformers.2.blocks"),
    ],
)
def test_an_image_size_that_leaves_few_tokens_is_noted_once(capsys, backbone, img_size, said):
    show_note_once.cache_clear()
    for recursions in (1, 2):
        build_backbone(BackboneSpec(backbone=backbone, img_size=img_size, recursions=recursions))
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "of the image in" in line]
    if said is None:
        assert lines == []
    else:
        assert len(lines) == 1
        assert lines[0].startswith(f"sret: {backbone} at {img_size} px ")
        assert said in lines[0]
        assert "model.timm_args.patch_size" in lines[0]


def test_baselines_are_rows_for_every_training_and_image_size():
    tables = {
        "baselines": ["vit_small", "pit_small"],
        "model": {"preset": "nano", "img_size": 32},
        "train": {"epochs": 2},
        "grid": {"model.recursions": [1, 2], "train.seed": [0, 1]},
    }
    runs = study_from_tables("s", tables).runs
    assert [(r.name, r.train.seed) for r in runs] == [
        ("nano", 0),
        ("nano", 1),
        ("nano", 0),
        ("nano", 1),
        ("vit_small", 0),
        ("pit_small", 0),
        ("vit_small", 1),
        ("pit_small", 1),
    ]
    assert all(run.model.img_size == 32 and run.model.num_classes == 10 for run in runs)
    assert runs[-1].model.untouched
    assert planned_row(runs[-1])["model.backbone"] == "pit_small"
    alone = study_from_tables("s", {"baselines": ["vit_tiny_patch16_224"], "train": {}})
    assert [(run.name, run.model.img_size) for run in alone.runs] == [("vit_tiny_patch16_224", 224)]
    with pytest.raises(SretError, match="give a list of names of timm models"):
        study_from_tables("s", {"baselines": "vit_small"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "vit_smal"], "no model 'vit_smal'"),
        (["--backbone", "vit_small", "--layers", 20], "layers cannot be combined with a backbone"),
        (["--backbone", "vit_small", "--set", "model.slices=2"], "slices cannot be combined with"),
        (["--share", 2], "also give a backbone"),
        (["--backbone", "resnet18", "--recursions", 2], "resnet18 cannot be made recursive"),
    ],
)
def test_flags_that_do_not_fit_get_one_line(sret, arguments, message):
    code, out, err = sret("build", *arguments)
    assert (code, out) == (3, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_backbone_is_built_written_and_read_back(sret, tmp_path):
    flags = ("--backbone", "pit_small", "--img-size", 32, "--recursions", 2, "--share", "all")
    code, out, _ = sret("build", *flags, "--out", "model", "--json")
    built = json.loads(out)
    assert (code, built["layers"], len(built["stages"])) == (0, 12, 3)
    assert [stage["blocks"] for stage in built["stages"]] == [1, 1, 1]
    code, out, _ = sret("build", "--from", "model")
    assert code == 0
    assert "transformers.2.blocks" in out
    model = load_model(tmp_path / "model")
    save_model(model, tmp_path / "again")
    assert torch.equal(logits(model), logits(load_model(tmp_path / "again")))


@pytest.mark.slow
def test_a_backbone_is_profiled_and_measured(sret):
    flags = ("--backbone", "swin_small", "--img-size", 32, "--recursions", 2)
    code, out, _ = sret("profile", *flags, "--device", "cpu", "--batch-size", 2, "--json")
    (row,) = json.loads(out)
    assert code == 0
    assert (row["layers"], row["model.backbone"], row["model.share"]) == (12, "swin_small", 1)
    assert row["step_seconds"] > 0
    code, out, _ = sret("profile", *flags)
    assert code == 0
    assert "matmul" in out


def test_a_model_that_cannot_be_built_is_a_failed_run_and_the_others_go_on(sret, tmp_path):
    text = (
        'baselines = ["vit_small"]\n[model]\nbackbone = "resnet18"\nimg_size = 32\nrecursions = 2\n'
    )
    (tmp_path / "s.toml").write_text(text)
    code, _, err = sret("profile", "s.toml")
    assert code == 3
    assert "resnet18 cannot be made recursive" in err
    rows = [json.loads(path.read_text()) for path in tmp_path.glob("runs/s/*/row.json")]
    assert sorted((row["name"], row["status"]) for row in rows) == [
        ("resnet18", "failed"),
        ("vit_small", None),
    ]
    (tmp_path / "s.toml").write_text(text.partition("\n")[2])
    assert sret("profile", "s.toml", "--runs", "alone")[0] == 3
    assert not (tmp_path / "alone").exists()


@pytest.mark.slow
def test_a_study_of_both_kinds_is_one_table(sret, tmp_path):
    (tmp_path / "s.toml").write_text(
        """
        baselines = ["xcit_small"]
        [model]
        img_size = 16
        [train]
        epochs = 1
        warmup_epochs = 0
        batch_size = 480
        recompute = "pass"
        [[runs]]
        "model.preset" = "nano"
        "model.embed_dims" = [8, 16, 32]
        [[runs]]
        name = "recursive"
        "model.backbone" = "vit_small"
        "model.recursions" = 2
        "model.nll" = "per_block"
        """
    )
    code, out, _ = sret("run", "s.toml")
    assert code == 0
    runs, comparisons = out.split("Shared models against their controls")
    assert comparisons.count("xcit_small") == 2
    lines = [line.split("│") for line in runs.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line[1:4]] for line in lines]
    assert cells == [
        ["nano", "shared", "8"],
        ["recursive", "shared", "8"],
        ["xcit_small", "baseline", "4"],
    ]
    assert sret("eval")[0] == 0


@pytest.mark.slow
def test_training_a_recursive_backbone_lowers_the_loss_and_is_repeatable(tmp_path):
    tables = {
        "model": {"backbone": "vit_small", "img_size": 16, "recursions": 2, "share": 2},
        "train": {"epochs": 2, "warmup_epochs": 0, "batch_size": 120},
    }
    (run,) = study_from_tables("s", tables).runs
    rows = [train(run, tmp_path / name) for name in ("a", "b")]
    assert rows[0]["final_loss"] == rows[1]["final_loss"] < 2.3
    assert evaluate_run(tmp_path / "a")["top1_percent"] == rows[0]["top1_percent"]


@pytest.mark.parametrize("name", ["deep", "sret_t"])
def test_a_preset_is_refused_as_a_backbone(sret, name):
    code, _, err = sret("build", "--backbone", name)
    assert code == 3
    assert f"'{name}' is a preset, not a timm model; use --preset {name}" in err
