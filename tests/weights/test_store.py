import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, fill, filled, saved, small
from safetensors.torch import save_file

from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.spec.presets import PRESETS
from sret_cli.weights.convert import load_reference, read_reference, save_reference
from sret_cli.weights.match import resample_pos_embed
from sret_cli.weights.reference import to_reference
from sret_cli.weights.store import load_model, save_model, spec_with_changes

# Logits of the reference implementation, with weights filled by a rule; see `fill`.
GOLDEN = json.loads((Path(__file__).parent.parent / "golden.json").read_text())


def golden_state_dict():
    """The reference's 510 keys: blocks are at even places, and two of them are one shared block."""
    tensors = {}
    for key, shape in GOLDEN["state_dict"]:
        parts = key.split(".")
        if parts[0] == "transformers" and int(parts[3]) % 4 == 2:
            parts[3] = str(int(parts[3]) - 2)
        tensors[key] = torch.tensor(fill(".".join(parts), shape)).float().reshape(shape)
    return tensors


@pytest.fixture(scope="module")
def golden():
    return golden_state_dict()


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_logits_of_the_reference_are_reproduced(golden, name):
    expected = GOLDEN["models"][name]
    model = build_model(PRESETS[name]).eval()
    assert list(model.spec.slices) == expected["slices"]
    assert list(model.spec.recursive_slices) == expected["recursive_slices"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    load_reference(model, golden)
    x = torch.tensor(np.random.RandomState(7).standard_normal((2, 3, 224, 224))).float()
    if expected["shuffle_seed"] is not None:
        model.set_reference_shuffle()
        torch.manual_seed(expected["shuffle_seed"])
    with torch.no_grad():
        logits = model(x)
    first = torch.tensor(expected["logits_first10"])
    torch.testing.assert_close(logits[:, :10], first, atol=1e-5, rtol=0)
    norms = torch.tensor(expected["logits_l2"]).float()
    torch.testing.assert_close(logits.norm(dim=1), norms, atol=1e-5, rtol=0)
    assert logits.argmax(1).tolist() == expected["argmax"]
    assert logits.abs().max().item() == pytest.approx(expected["absmax"], abs=1e-5)


def test_golden_weights_are_recognised_as_sret_t(golden, tmp_path):
    torch.save({"model": golden}, tmp_path / "sret.pth")
    model, name, notes, *_ = read_reference(tmp_path / "sret.pth")
    assert (name, model.spec) == ("sret_t", PRESETS["sret_t"])
    assert notes == [
        "recognised sret_t from the shapes, which do not depend on slices: took slices 8-4-1, "
        "then 2-1-1 (set others by --slices or --preset)"
    ]


def test_a_round_trip_through_the_references_layout_is_bitwise(tmp_path):
    model = filled(small(blocks=(1, 2, 1), recursions=(3, 2, 1)))
    path = save_reference(model, tmp_path)
    other = build_model(model.spec)
    load_reference(other, path)
    assert_same(model, other)
    stored = torch.load(path, weights_only=True)["model"]
    assert [k for k in stored if "coefficient" in k][:6] == [
        *(f"transformers.0.blocks.0.coefficient{n}.bias" for n in (1, 2, 3, 4)),
        *(f"transformers.0.blocks.1.coefficient{n}.bias" for n in (1, 2)),
    ]
    again = save_reference(other, tmp_path / "again")
    assert path.read_bytes() == again.read_bytes()


def test_golden_weights_come_back_under_the_references_keys(golden, tmp_path):
    model = build_model(PRESETS["sret_t"])
    load_reference(model, golden)
    stored = to_reference(model.spec, model.state_dict())
    assert [[k, list(t.shape)] for k, t in stored.items()] == GOLDEN["state_dict"]
    assert all(torch.equal(stored[k], golden[k].to(stored[k].dtype)) for k in golden)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_state_dicts_are_read_bare_and_under_their_usual_keys(tmp_path, wrap):
    model = filled(small())
    torch.save(wrap(to_reference(model.spec, model.state_dict())), tmp_path / "bare.pt")
    other = build_model(model.spec)
    load_reference(other, str(tmp_path / "bare.pt"))
    assert_same(model, other)


def test_a_deit_checkpoint_is_read_with_its_arguments_beside_it(tmp_path):
    model = filled(small())
    tensors = to_reference(model.spec, model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    whole = {
        "model": {f"module.{k}": v for k, v in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 299,
        "args": argparse.Namespace(lr=5e-4, data_path="/data", drop=None),
    }
    torch.save(whole, tmp_path / "deit.pth")
    other = build_model(model.spec)
    load_reference(other, tmp_path / "deit.pth")
    assert_same(model, other)


def test_safetensors_in_the_references_layout_are_read(tmp_path):
    model = filled(small())
    tensors = to_reference(model.spec, model.state_dict())
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    other = build_model(model.spec)
    load_reference(other, tmp_path / "model.safetensors")
    assert_same(model, other)


@pytest.mark.parametrize("key", ["norm1.weight", "attn.qkv.weight", "coefficient3.bias"])
def test_repeated_keys_of_a_shared_tensor_have_to_agree(key):
    model = filled(small())
    tensors = to_reference(model.spec, model.state_dict())
    key = f"transformers.1.blocks.2.{key}"
    tensors[key] = tensors[key] + 1e-6
    with pytest.raises(SretError, match=f"{key} differs from transformers.1.blocks.0") as refused:
        load_reference(build_model(model.spec), tensors)
    assert refused.value.code == 5


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"nll": "per_block"}, "an NLL for each pass"),
        ({"nll": "none"}, "an NLL for each pass"),
        ({"residual": "plain"}, "it learns coefficients"),
        ({"loop": "external", "blocks": 2}, "stage 1 does not run its blocks one after the other"),
    ],
)
def test_a_model_that_the_reference_has_not_is_refused_with_the_reason(values, reason, tmp_path):
    with pytest.raises(SretError, match=f"no layout for the weights.*{reason}"):
        save_reference(build_model(small(**values)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_unexpected_and_misshapen_keys_are_a_table():
    model = filled(small())
    tensors = to_reference(model.spec, model.state_dict())
    del tensors["norm.bias"]
    tensors |= {"head_dist.bias": torch.zeros(10), "norm.weight": torch.zeros(31)}
    with pytest.raises(SretError, match="1 missing, 1 unexpected, 1 misshapen") as refused:
        load_reference(model, tensors)
    assert refused.value.code == 5
    assert sorted(refused.value.table[1:]) == [
        ("head_dist.bias", "unexpected", "(10,)", "–"),
        ("norm.bias", "missing", "–", "(32,)"),
        ("norm.weight", "misshapen", "(31,)", "(32,)"),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = filled(small())
    tensors = to_reference(model.spec, model.state_dict())
    tensors["norm.bias"] = torch.full((32,), value)
    with pytest.raises(SretError, match=r"norm.bias has 32 values that are NaN or infinite"):
        load_reference(model, tensors)


def test_a_fresh_head_takes_another_number_of_classes():
    model = filled(small())
    tensors = to_reference(model.spec, model.state_dict())
    other = build_model(small(num_classes=3))
    head = other.head.weight.clone()
    with pytest.raises(SretError, match="2 misshapen.*--reset-head gives it a fresh head"):
        load_reference(other, tensors)
    load_reference(other, tensors, reset_head=True)
    assert torch.equal(other.head.weight, head)
    assert torch.equal(other.norm.weight, model.norm.weight)


def test_position_embeddings_are_resampled_for_another_image_size(tmp_path):
    model = filled(small())
    larger = build_model(small(img_size=128))
    load_reference(larger, to_reference(model.spec, model.state_dict()))
    assert larger.pos_embed.shape == (1, 8, 16, 16)
    expected = torch.nn.functional.interpolate(
        model.pos_embed, (16, 16), mode="bicubic", antialias=True
    )
    assert torch.equal(larger.pos_embed, expected)
    save_model(model, tmp_path)
    again = load_model(tmp_path, {"img_size": 128})
    assert_same(larger, again)
    assert again.spec.img_size == 128


def test_a_constant_embedding_stays_what_it_is_when_resampled():
    resampled = resample_pos_embed(torch.full((1, 4, 7, 7), 0.5), 10)
    assert resampled.shape == (1, 4, 10, 10)
    torch.testing.assert_close(resampled, torch.full((1, 4, 10, 10), 0.5))


def test_slices_that_no_longer_divide_are_reported_with_those_that_do():
    spec = PRESETS["sret_lt_16_14"]
    message = r"stage 2: 14 slices \(slices\) do not divide 576 tokens.*use 12, 16, "
    with pytest.raises(SretError, match=message):
        spec_with_changes(spec, {"img_size": 384})
    fitted = spec_with_changes(spec, {"img_size": 384, "slices": 16})
    assert fitted.slices == fitted.recursive_slices == (16, 16, 16)
    assert (
        spec_with_changes(spec, {"img_size": 384, "slices": 16, "recursive_slices": 1}).slices[0]
        == 16
    )


def test_a_design_that_is_no_preset_is_recognised_from_its_shapes(tmp_path):
    spec = small(blocks=(1, 2, 1), recursions=(3, 2, 4), mlp_ratio=2.7, nll_ratio=1.5)
    spec = spec_with_changes(spec, {"slices": 1, "num_classes": 7, "in_chans": 1})
    model = filled(spec)
    path = saved(model, tmp_path / "other.pth")
    with pytest.raises(SretError, match=r"widths 8-16-32, passes 3-4-4.*model.num_heads") as no:
        read_reference(path)
    assert no.value.code == 5
    found, name, notes, *_ = read_reference(path, None, {"num_heads": [1, 2, 4]})
    assert (name, found.spec) == ("converted", spec)
    assert_same(model, found)
    assert "took slices 1-1-1, then 1-1-1" in notes[0]


@pytest.mark.parametrize(
    "name", ["sret_t", "sret_lt", "sret_s", "sret_t_384", "sret_s_384", "sret_s_512"]
)
def test_published_designs_are_recognised_whatever_their_classes(name, tmp_path):
    model = build_model(PRESETS[name].with_values(num_classes=3))
    found, preset, *_ = read_reference(saved(model, tmp_path / "published.pth"))
    assert (preset, found.spec) == (name, model.spec)
    assert_same(model, found)


def test_a_preset_and_slices_that_are_named_stand_before_those_recognised(tmp_path):
    model = build_model(PRESETS["sret_lt"].with_values(num_classes=3))
    path = saved(model, tmp_path / "lt.pth")
    named = read_reference(path, "sret_lt_16_14")
    assert named.model.spec == PRESETS["sret_lt_16_14"].with_values(num_classes=3)
    assert (named.name, named.notes) == ("sret_lt_16_14", [])
    sliced = read_reference(path, None, {"slices": 7})
    assert sliced.model.spec.slices == sliced.model.spec.recursive_slices == (7, 7, 7)
    assert sliced.notes == ["recognised sret_lt from the shapes"]
    with pytest.raises(SretError, match=r"lt.pth is of another model: \d+ tensors differ"):
        read_reference(path, "sret_t")


def test_an_unshared_model_is_told_from_a_shared_one(tmp_path):
    spec = small(recursions=1, blocks=2)
    found = read_reference(saved(filled(spec), tmp_path / "x.pth"), None, {"num_heads": [1, 2, 4]})
    assert (found.model.spec.blocks, found.model.spec.recursions) == ((2, 2, 2), (1, 1, 1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["visual.proj"], "not an SReT's weights in the reference's layout.*visual.proj"),
        (["transformers.0.blocks.0.norm1.weight"], "stage 1: 1 entries .* not pairs"),
        (
            ["transformers.0.blocks.0.norm1.weight", "transformers.0.blocks.1.norm1.weight"],
            "pos_embed is missing",
        ),
        (["transformers.1.blocks.0.norm1.weight"], "stage 1: 0 entries"),
    ],
)
def test_weights_of_something_else_are_said_to_be_so(keys, message, tmp_path):
    torch.save(dict.fromkeys(keys, torch.zeros(3)), tmp_path / "x.pth")
    with pytest.raises(SretError, match=message) as refused:
        read_reference(tmp_path / "x.pth")
    assert refused.value.code == 5


def test_a_model_is_not_written_over_another(tmp_path):
    model = build_model(small())
    save_reference(model, tmp_path)
    before = (tmp_path / "model.pth").read_bytes()
    with pytest.raises(SretError, match="already exists"):
        save_reference(filled(small()), tmp_path)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
