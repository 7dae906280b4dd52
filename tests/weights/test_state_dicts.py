"""Which state dict of a checkpoint is taken, and what `sret convert` makes of it."""

import json

import pytest
import torch
from helpers import HEADS, assert_same, filled, saved, small
from torch.optim.swa_utils import AveragedModel

from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.weights.convert import load_reference
from sret_cli.weights.reference import to_reference
from sret_cli.weights.safe_read import read_weights
from sret_cli.weights.state_dicts import choose_weights, without_prefix
from sret_cli.weights.store import load_model

OWN = ("stem", "head")
PLAIN, OTHER = torch.zeros(2), torch.ones(2)


def keys(prefix="", tensor=PLAIN):
    """The state dict of a model whose keys are `stem.weight` and `head.bias`."""
    return {f"{prefix}stem.weight": tensor, f"{prefix}head.bias": tensor}


def chosen(value, averaged=False):
    """The first tensor that is taken, and the place where it was."""
    weights = choose_weights(value, "file", OWN, averaged)
    assert list(weights.tensors) == ["stem.weight", "head.bias"]
    return int(weights.tensors["stem.weight"][0]), weights.place


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "backbone.", "net.", "timm_model."),
        *("module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module.backbone."),
    ],
)
def test_any_prefix_that_all_keys_share_is_taken_off(prefix):
    assert list(without_prefix(keys(prefix), OWN)) == ["stem.weight", "head.bias"]
    weights = choose_weights({"state_dict": keys(prefix)}, "file", OWN)
    assert list(weights.tensors) == ["stem.weight", "head.bias"]
    assert weights.notes == (f"removed {prefix!r} from all keys",)


def test_a_prefix_ends_where_the_models_own_keys_begin():
    own = {"stem.conv.weight": PLAIN, "stem.conv.bias": PLAIN}
    assert list(without_prefix(own, OWN)) == list(own)
    assert list(without_prefix({f"model.{key}": PLAIN for key in own}, OWN)) == list(own)
    assert list(choose_weights({"model.visual.proj": PLAIN}, "file", OWN).tensors) == [
        "model.visual.proj"
    ]
    assert list(without_prefix({"module.a": PLAIN, "b": PLAIN})) == ["module.a", "b"]


@pytest.mark.parametrize(
    ("value", "plain", "averaged"),
    [
        ({"model": keys(), "model_ema": keys("module.", OTHER)}, "model", "model_ema.module"),
        (
            {"arch": "vit", "state_dict": keys(), "state_dict_ema": keys("", OTHER)},
            *("state_dict", "state_dict_ema"),
        ),
        (
            {"state_dict": {**keys("model."), **keys("ema_model.module.", OTHER)}},
            *("state_dict.model", "state_dict.ema_model.module"),
        ),
        (
            {"state_dict": keys("", OTHER), "current_model_state": keys(), "averaging_state": {}},
            *("current_model_state", "state_dict"),
        ),
        (
            {"model": keys(), "callbacks": {"EMACallback": {"weights": keys("", OTHER)}}},
            *("model", "callbacks.EMACallback.weights"),
        ),
        (
            {"ema": {"decay": 0.9, "module": keys("", OTHER)}, "model": keys()},
            "model",
            "ema.module",
        ),
        ({"swa_model": keys("", OTHER), "net": keys("module.")}, "net.module", "swa_model"),
        ({**keys("online_model."), **keys("ModelEmaV3.", OTHER)}, "online_model", "ModelEmaV3"),
    ],
    ids=["deit", "timm", "lightning", "averaging", "callback", "nested", "swa", "bare"],
)
def test_plain_weights_are_taken_unless_averaged_ones_are_asked_for(value, plain, averaged):
    assert chosen(value) == (0, plain)
    assert choose_weights(value, "file", OWN).notes[0] == (
        f"file holds plain weights ({plain}) and averaged ones ({averaged}): took the plain ones"
    )
    assert chosen(value, averaged=True) == (1, averaged)


def test_averaged_weights_alone_are_taken_and_said_to_be_so():
    weights = choose_weights({"model": AveragedModel(build_model(small())).state_dict()}, "file")
    assert weights.averaged
    assert weights.notes[0] == "took averaged weights: model.module"
    assert "n_averaged" not in weights.tensors
    assert "head.weight" in weights.tensors


def test_what_is_no_model_is_not_taken_for_one():
    optimizer = {"state": {0: {"exp_avg": OTHER, "exp_avg_sq": OTHER}}}
    callbacks = {"ModelCheckpoint": {"best_k_models": {"epoch=1": torch.tensor(0.5)}}}
    schema = {"schema": keys("", OTHER)}
    value = {"optimizer": optimizer, "callbacks": callbacks, **schema, "model": keys()}
    assert chosen(value) == (0, "model")
    assert choose_weights(value, "file", OWN).notes == ()
    with pytest.raises(SretError, match="file holds no averaged weights, only schema, model"):
        choose_weights(value, "file", OWN, averaged=True)
    assert choose_weights({"optimizer": optimizer}, "file", OWN) is None


def test_what_stands_next_to_a_model_is_left_out_and_named():
    value = {"state_dict": {**keys("model."), "criterion.weight": OTHER, "loss.a": OTHER}}
    weights = choose_weights(value, "file", OWN)
    assert list(weights.tensors) == ["stem.weight", "head.bias"]
    assert weights.notes[0] == "ignored criterion.weight and 1 more, which are next to the model"


def test_of_several_models_none_is_guessed():
    value = {"student": keys("module."), "teacher": keys("module.", OTHER)}
    with pytest.raises(SretError, match=r"several models \(student.module, teacher.module\)") as no:
        choose_weights(value, "file", OWN)
    assert no.value.code == 5


def test_dicts_that_hold_themselves_or_each_other_many_times_end(tmp_path):
    value = {"model": keys()}
    value["ema"] = value
    level = {}
    for _ in range(40):
        level = {str(number): level for number in range(40)}
    torch.save({**value, "level": level}, tmp_path / "knot.ckpt")
    assert list(read_weights(tmp_path / "knot.ckpt", OWN).tensors) == ["stem.weight", "head.bias"]


@pytest.fixture
def lightning(tmp_path):
    """A file as Lightning writes it, with the plain and the averaged model that are in it."""
    plain, averaged = filled(small()), build_model(small())
    state = {
        f"{prefix}{key}": tensor
        for prefix, model in (("model._orig_mod.", plain), ("model_ema.module.", averaged))
        for key, tensor in to_reference(model.spec, model.state_dict()).items()
    }
    settings = {"epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.5.1"}
    optimizers = [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}]
    content = {**settings, "state_dict": state, "optimizer_states": optimizers, "loops": {}}
    torch.save({**content, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    return plain, averaged


def test_a_checkpoint_of_lightning_is_converted_with_the_weights_asked_for(
    sret, lightning, tmp_path
):
    code, _, err = sret("convert", "last.ckpt", "--out", "plain", *HEADS)
    assert code == 0
    assert err.splitlines()[:2] == [
        "last.ckpt holds plain weights (state_dict.model._orig_mod) and averaged ones "
        "(state_dict.model_ema.module): took the plain ones; --ema takes the averaged ones",
        "removed 'model._orig_mod.' from all keys",
    ]
    code, _, err = sret("convert", "last.ckpt", "--out", "averaged", "--ema", *HEADS)
    assert code == 0
    assert err.startswith("took averaged weights: state_dict.model_ema.module\n")
    for name, model in zip(("plain", "averaged"), lightning, strict=True):
        assert_same(load_model(tmp_path / name), model)
        source = json.loads((tmp_path / name / "config.json").read_text())["source"]
        assert source["averaged"] == (name == "averaged")


def test_averaged_weights_that_are_not_there_are_refused(sret, tmp_path):
    saved(filled(small()), tmp_path / "plain.pth")
    code, out, err = sret("convert", "plain.pth", "--out", "x", "--ema", *HEADS)
    assert (code, out) == (5, "")
    assert err == "sret: plain.pth holds no averaged weights, only model; leave out --ema\n"
    assert not (tmp_path / "x").exists()
    code, _, err = sret("convert", "x", "--out", "y", "--ema", "--to-reference")
    assert (code, err) == (2, "sret: --to-reference writes a model as it is; leave out the rest\n")


def test_a_prefix_is_taken_off_a_state_dict_and_a_file_in_python(tmp_path):
    model, other = filled(small()), build_model(small())
    tensors = to_reference(model.spec, model.state_dict())
    load_reference(other, {f"module._orig_mod.{key}": tensor for key, tensor in tensors.items()})
    assert_same(other, model)
    torch.save({f"net.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "net.bin")
    again = build_model(small())
    load_reference(again, tmp_path / "net.bin")
    assert_same(again, model)
