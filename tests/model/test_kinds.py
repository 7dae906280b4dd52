import pytest
from helpers import backbone_spec

from sret_cli.model.kinds import (
    build_any,
    count_layers,
    describe_stages,
    inference_copy,
    set_recursions,
    sret_stages,
)
from sret_cli.runtime.errors import SretError


@pytest.fixture(scope="module")
def vit():
    return build_any(backbone_spec("vit", recursions=2))


def test_layers_are_counted_as_the_model_runs_now(tiny, vit):
    model = build_any(tiny.with_values(blocks=1, recursions=2))
    stages = tiny.stages
    assert (count_layers(model), count_layers(vit)) == (2 * stages, 8)
    set_recursions(model, 5)
    assert count_layers(model) == 5 * stages
    set_recursions(model, None)
    assert count_layers(model) == 2 * stages


def test_recursions_of_a_timm_model_cannot_be_changed(vit):
    with pytest.raises(SretError, match="^runs/x holds a timm model; its recursions cannot be ch"):
        set_recursions(vit, 3, "runs/x")


def test_only_an_sret_has_stages_but_both_kinds_are_described(tiny, vit):
    model = build_any(tiny)
    assert (len(sret_stages(model)), sret_stages(vit)) == (tiny.stages, [])
    assert [stage["embed_dims"] for stage in describe_stages(model)] == list(tiny.embed_dims)
    (stage,) = describe_stages(vit)
    assert (stage["name"], stage["blocks"], stage["layers"]) == ("blocks", 4, 8)


def test_a_copy_for_inference_leaves_the_model_in_training(tiny, vit):
    for model in (build_any(tiny), vit.train()):
        copy = inference_copy(model)
        assert model.training and not copy.training


def test_a_timm_model_cannot_be_trained_at_changing_recursions(sret, tmp_path):
    """It was an AttributeError."""
    model = ("--backbone", "vit_small", "--img-size", 32)
    train = ("--set", "train.recursions_range=[1,2]", "--set", "train.epochs=2")
    code, _, err = sret("train", *model, *train, "--runs", tmp_path)
    assert code == 3
    assert "this run holds a timm model; its recursions cannot be changed" in err
