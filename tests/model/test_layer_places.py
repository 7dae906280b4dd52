import pytest
import timm
import torch
from helpers import FAMILIES, backbone_model

from sret_cli.model.backbone import block_sequences, build_backbone
from sret_cli.model.kinds import build_any
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.train import TrainSpec
from sret_cli.training.optimizer import create_optimizer

# Sets of weights with `share` blocks tied, where a family has not one sequence of four blocks.
BANKS = {"pit": {1: 6, 2: 3, "all": 3}, "swin": {1: 6, 2: 3, "all": 2}}
ALL = pytest.mark.parametrize("family", FAMILIES)


def scales_of(model, layer_decay=0.5):
    """The factor on the learning rate of each parameter, by its name."""
    optimizer = create_optimizer(model, TrainSpec(layer_decay=layer_decay))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {
        names[id(parameter)]: group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert scales.keys() == set(names.values())
    return scales


def blocks_and_nlls(model):
    """Of each set of weights: the first block's name, and the names of the NLLs of its passes."""
    for name, passes in block_sequences(model).items():
        found = {index: set() for index in range(0, len(passes), passes.share)}
        for number in range(passes.layers):
            internal = passes.loop == "internal"
            index = number // passes.recursions if internal else number % len(passes)
            bank = index // passes.share
            nll = {"per_pass": number, "per_block": bank}.get(passes.nll)
            if nll is not None:
                found[bank * passes.share].add(f"{name}.nlls.{nll}")
        yield from ((f"{name}.{index}", nlls) for index, nlls in found.items())


@ALL
@pytest.mark.parametrize(
    ("nll", "share", "loop"),
    [
        ("none", 1, "internal"),
        ("per_block", 1, "internal"),
        ("per_pass", 2, "internal"),
        ("per_block", 2, "external"),
        ("per_pass", "all", "external"),
    ],
)
def test_all_parameters_of_a_block_decay_with_it(family, nll, share, loop):
    model = backbone_model(family, recursions=2, nll=nll, share=share, loop=loop)
    scales, rates, walked = scales_of(model), [], set()
    for block, nlls in blocks_and_nlls(model):
        of_block = {n for n in scales if any(n.startswith(f"{m}.") for m in (block, *nlls))}
        assert len({scales[name] for name in of_block}) == 1
        rates.append(scales[min(of_block)])
        walked |= of_block
    assert {
        n for n in scales for name in block_sequences(model) if n.startswith(f"{name}.")
    } == walked
    assert len(rates) == BANKS.get(family, {1: 4, 2: 2, "all": 1})[share]
    assert rates == sorted(set(rates))  # each block learns faster than the one before it
    assert rates[-1] < scales[next(n for n in scales if n.startswith("head"))] == 1.0
    stem = {n for n in scales if n.startswith(("stem", "patch_embed", "cls_token", "pos_embed"))}
    assert {scales[name] for name in stem} == {rates[0] / 2}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        *((family, [1 / 16, 1 / 8, 1 / 4, 1 / 2]) for family in ("vit", "beit", "cait", "mixer")),
        ("xcit", [1 / 64, 1 / 32, 1 / 16, 1 / 8]),  # two layers of class attention come after
        *((family, [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]) for family in ("pit", "swin")),
    ],
)
def test_every_block_of_a_backbone_is_a_layer(family, expected):
    model = backbone_model(family, recursions=2, nll="per_block")
    scales = scales_of(model)
    found = [
        scales[f"{name}.nlls.{number}.norm.weight"]
        for name, passes in block_sequences(model).items()
        for number in range(passes.banks)
    ]
    assert found == expected


def test_the_nlls_of_deit_tiny_have_the_rates_of_their_blocks():
    values = {"recursions": 2, "nll": "per_block", "img_size": 32}
    model = build_backbone(BackboneSpec(backbone="deit_tiny_patch16_224", **values))
    scales = scales_of(model, layer_decay=0.7)
    # 12 blocks and then the head: 0.7 to the power of 12, and of 1
    assert scales["blocks.nlls.0.mlp.fc1.weight"] == pytest.approx(0.013841287)
    assert scales["blocks.0.mlp.fc1.weight"] == pytest.approx(0.013841287)
    assert scales["blocks.nlls.11.lrc"] == scales["blocks.11.norm1.weight"] == pytest.approx(0.7)


def test_pools_of_pit_decay_with_the_block_that_they_lead_to():
    scales = scales_of(backbone_model("pit"))
    assert scales["transformers.1.pool.conv.weight"] == 1 / 16
    assert scales["transformers.1.blocks.0.attn.qkv.weight"] == 1 / 16
    assert scales["transformers.0.blocks.1.attn.qkv.weight"] == 1 / 32


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("vit_small_patch16_rope_mixed_224", "rope.freqs"),
        ("vit_srelpos_small_patch16_224", "shared_rel_pos.mlp.fc1.weight"),
    ],
)
def test_tables_that_all_blocks_read_learn_as_slowly_as_the_stem(name, table):
    with torch.device("meta"):
        model = build_backbone(BackboneSpec(backbone=name, recursions=2, nll="per_block"))
    scales = scales_of(model)
    assert scales[table] == scales["patch_embed.proj.weight"] == 2**-13
    assert scales["blocks.nlls.0.norm.bias"] == scales["blocks.0.norm1.bias"] == 2**-12


def test_a_model_without_recursion_keeps_timms_places():
    model = backbone_model("swin")
    untouched = timm.create_model("swin_small", img_size=32, num_classes=10)
    assert scales_of(model) == scales_of(untouched)


def test_a_model_without_passes_keeps_timms_places():
    model = build_backbone(BackboneSpec(backbone="resnet18", img_size=32, num_classes=10))
    assert scales_of(model)["fc.weight"] == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"nll": "per_pass", "recursions": (2, 3, 2)},
        {"nll": "per_pass", "recursions": (2, 3, 2), "loop": "external"},
        {"nll": "per_block", "residual": "layerscale"},
        {"nll": "none", "residual": "rezero"},
        {"nll": "per_pass", "order": ((0,), (1, 0, 1), (0, 0))},
    ],
    ids=["internal", "external", "layerscale", "rezero", "order"],
)
def test_all_parameters_of_a_block_of_an_sret_decay_with_it(tiny, values):
    model = build_any(tiny.with_values(**values))
    scales, rates = scales_of(model), []
    for number, stage in enumerate(model.stages):
        for index in range(len(stage.blocks)):
            nlls = {p.nll for p in model.spec.schedule(number) if p.block == index} - {None}
            starts = [f"stages.{number}.blocks.{index}."]
            starts += [f"stages.{number}.nlls.{nll}." for nll in nlls]
            of_block = {scales[n] for n in scales if n.startswith(tuple(starts))}
            assert len(of_block) == 1
            rates += of_block
    assert rates == [0.0625, 0.125, 0.25, 0.5]
    assert scales["pools.0.conv.weight"] == 0.125
    assert scales["pools.1.conv.bias"] == 0.5


def test_coefficients_per_pass_decay_with_the_first_block_of_their_stage(tiny):
    scales = scales_of(build_any(tiny.with_values(lrc="per_pass")))
    assert [scales[f"stages.{stage}.lrc_P4"] for stage in range(3)] == [0.0625, 0.125, 0.5]
