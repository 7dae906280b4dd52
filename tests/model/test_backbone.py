import copy

import pytest
import timm
import torch
from helpers import (
    BLOCKS,
    FAMILIES,
    SMALL,
    backbone_images,
    backbone_model,
    backbone_spec,
    logits,
    parameter_count,
    torch_products,
)
from timm.models.vision_transformer import VisionTransformer

from sret_cli.cost.module_costs import count_module
from sret_cli.cost.trace import trace_backbone
from sret_cli.model.backbone import block_sequences, build_backbone
from sret_cli.model.kinds import count_layers
from sret_cli.runtime.errors import SretError
from sret_cli.spec.backbone import BackboneSpec

ALL = pytest.mark.parametrize("family", FAMILIES)


@ALL
def test_without_recursion_a_model_equals_timms_bitwise(family):
    model = backbone_model(family)
    untouched = timm.create_model(f"{family}_small", img_size=32, num_classes=10)
    untouched.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(untouched))
    assert [len(p) for p in block_sequences(model).values()] == BLOCKS.get(family, [4])
    assert count_layers(model) == sum(BLOCKS.get(family, [4]))


@ALL
@pytest.mark.parametrize("loop", ["internal", "external"])
def test_recursion_adds_layers_and_no_weights(family, loop):
    plain, model = backbone_model(family), backbone_model(family, recursions=2, loop=loop)
    assert count_layers(model) == 2 * count_layers(plain)
    assert parameter_count(model) == parameter_count(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert logits(model).isfinite().all()
    assert not torch.equal(logits(model), logits(plain))


@ALL
@pytest.mark.parametrize("nll", ["none", "per_block", "per_pass"])
def test_every_parameter_gets_a_gradient_and_is_registered_once(family, nll):
    model = backbone_model(family, recursions=2, share=2, nll=nll)
    model.train()(backbone_images()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    assert {n for n, _ in model.named_parameters()} <= state.keys()


@ALL
@pytest.mark.parametrize("share", [2, "all"])
def test_tied_layers_equal_layers_with_copies_of_the_weights(family, share):
    tied, untied = backbone_model(family, share=share), backbone_model(family, seed=1)
    untied.load_state_dict(tied.state_dict(), strict=False)
    expected = parameter_count(untied)
    for passes in block_sequences(untied).values():
        group = len(passes) if share == "all" else share
        one = sum(p.numel() for p in passes[0].parameters())
        expected -= one * (len(passes) - len(passes) // group)
        for index in range(len(passes)):
            first = passes[index - index % group]
            for parameter, source in zip(
                passes[index].parameters(), first.parameters(), strict=True
            ):
                parameter.data.copy_(source)
    assert parameter_count(tied) == expected
    assert count_layers(tied) == count_layers(untied)
    assert torch.equal(logits(tied), logits(untied))


@pytest.mark.parametrize(
    ("loop", "order"),
    [("internal", [0, 0, 1, 1, 2, 2, 3, 3]), ("external", [0, 1, 2, 3, 0, 1, 2, 3])],
)
def test_passes_come_in_the_order_of_the_loop(loop, order):
    model = backbone_model("vit", recursions=2, loop=loop)
    deep = VisionTransformer(img_size=32, num_classes=10, **{**SMALL, "depth": 8})
    deep.load_state_dict(model.state_dict(), strict=False)
    for number, index in enumerate(order):
        deep.blocks[number].load_state_dict(model.blocks[index].state_dict())
    assert torch.equal(logits(model), logits(deep))


def test_nlls_are_per_pass_or_shared_by_the_passes_of_a_set_of_weights():
    plain = parameter_count(backbone_model("vit"))
    nll = 2 * 32 + 2 * (32 * 32 + 32) + 2  # LayerNorm, two linear layers, two coefficients
    assert parameter_count(backbone_model("vit", recursions=3, nll="per_pass")) == plain + 12 * nll
    assert parameter_count(backbone_model("vit", recursions=3, nll="per_block")) == plain + 4 * nll
    shared = parameter_count(backbone_model("vit", recursions=3, share=2))
    assert (
        parameter_count(backbone_model("vit", recursions=3, share=2, nll="per_block"))
        == shared + 2 * nll
    )
    wide = backbone_model("vit", nll="per_pass", nll_ratio=2.0)
    assert parameter_count(wide) == plain + 4 * (nll + 2 * 32 * 32 + 32)


@ALL
def test_recomputing_passes_changes_no_gradient(family):
    gradients = []
    for recompute in (False, True):
        model = backbone_model(family, recursions=2, share=2, nll="per_block").train()
        model.set_grad_checkpointing(recompute)
        model(backbone_images()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_tied_weights_stay_tied_when_a_model_is_moved_or_copied():
    model = backbone_model("swin", share=2)
    moved = copy.deepcopy(model).to(torch.float64).to("meta").to_empty(device="cpu")
    for passes in block_sequences(moved).values():
        assert passes[1].mlp.fc1.weight is passes[0].mlp.fc1.weight
    assert parameter_count(moved) == parameter_count(model)
    assert moved.state_dict().keys() == model.state_dict().keys()


def test_deit_tiny_counts_its_attention():
    costs = trace_backbone(BackboneSpec(backbone="deit_tiny_patch16_224"))
    # 12 layers, 3 heads, 197 tokens, head width 64, two products
    attention = 12 * 3 * 197 * 197 * 64 * 2
    assert costs.macs_by_kind()["scaled_dot_product_attention"] == attention == 178_831_872
    assert (costs.params, costs.layers) == (5_717_416, 12)
    assert costs.macs == 1_258_411_200
    assert costs.macs - attention == 1_079_579_328  # what fvcore alone says


# At 224 px and 1,000 classes: parameters, multiply-adds, and parameters of one block of each stage.
REAL = [
    ("vit_tiny_patch16_224", 5_717_416, 1_258_411_200, [(12, 444_864)]),
    ("deit_tiny_patch16_224", 5_717_416, 1_258_411_200, [(12, 444_864)]),
    ("deit3_small_patch16_224", 22_059_496, 4_608_338_304, [(12, 1_775_232)]),
    ("beit_base_patch16_224", 86_530_984, 17_581_987_584, [(12, 7_097_424)]),
    ("eva02_tiny_patch14_224", 5_695_144, 1_703_632_320, [(12, 444_928)]),
    ("cait_xxs24_224", 11_956_264, 2_533_076_160, [(24, 445_288)]),
    ("xcit_nano_12_p16_224", 3_053_224, 557_202_560, [(12, 201_732)]),
    ("mixer_s16_224", 18_528_264, 3_785_488_384, [(8, 2_202_564)]),
    ("resmlp_12_224", 15_350_872, 3_009_739_776, [(12, 1_222_484)]),
    ("gmlp_ti16_224", 5_867_328, 1_344_167_424, [(30, 187_988)]),
    ("pit_ti_224", 4_847_272, 702_020_096, [(2, 49_984), (6, 198_272), (4, 789_760)]),
    (
        "swin_tiny_patch4_window7_224",
        28_288_354,
        4_509_194_496,
        [(2, 112_347), (2, 445_878), (6, 1_776_492), (2, 7_091_928)],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params", "macs", "blocks"), REAL)
def test_models_of_every_timm_family_keep_or_tie_their_weights(name, params, macs, blocks):
    spec = BackboneSpec(backbone=name)
    costs = trace_backbone(spec)
    assert (costs.params, costs.macs) == (params, macs)
    assert costs.layers == sum(count for count, _ in blocks)
    assert parameter_count(build_backbone(spec.with_values(recursions=2))) == params
    half = parameter_count(build_backbone(spec.with_values(share=2)))
    assert half == params - sum(count // 2 * one for count, one in blocks)
    alone = parameter_count(build_backbone(spec.with_values(share="all")))
    assert alone == params - sum((count - 1) * one for count, one in blocks)


@pytest.mark.slow
@ALL
def test_macs_equal_torchs_count_and_grow_by_the_blocks(family):
    one, two, three = (trace_backbone(backbone_spec(family, recursions=n)) for n in (1, 2, 3))
    assert three.macs - two.macs == two.macs - one.macs > one.macs / 2
    assert three.params == one.params
    model = backbone_model(family, recursions=2).eval().requires_grad_(False)
    products = {k: v for k, v in two.macs_by_kind().items() if "norm" not in k and "pool" not in k}
    assert sum(products.values()) == torch_products(model, torch.zeros(1, 3, 32, 32))


def test_the_macs_of_a_block_equal_a_count_by_hand():
    one, two = (trace_backbone(backbone_spec("vit", recursions=n)) for n in (1, 2))
    tokens, width = 17, 32
    products = 12 * tokens * width**2 + 2 * tokens**2 * width
    norms = 2 * 5 * tokens * width  # fvcore's rule for a LayerNorm
    assert two.macs - one.macs == 4 * (products + norms)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "loop"), [("vit", "internal"), ("xcit", "internal"), ("swin", "external")]
)
def test_costs_of_many_recursions_are_those_of_the_whole_model(family, loop):
    spec = backbone_spec(family, recursions=5, loop=loop, share=2, nll="per_pass")
    costs, model = trace_backbone(spec), build_backbone(spec)
    whole = count_module(model, torch.zeros(1, 3, 32, 32))
    assert costs.layers == count_layers(model)
    assert (costs.params, costs.macs) == (whole.params, whole.macs)
    assert costs.activations == whole.activations
    assert costs.activation_bytes == whole.activation_bytes


def test_a_model_whose_batch_norm_refuses_one_image_is_profiled():
    values = {"backbone": "levit_128s", "img_size": 64, "num_classes": 10}
    assert trace_backbone(BackboneSpec(**values)).activation_bytes > 0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"backbone": "resnet18"}, "it has no sequence of transformer blocks"),
        ({"backbone": "convnext_atto"}, "are not transformer blocks: they take maps, not"),
        ({"backbone": "tnt_s_legacy_patch16_224"}, "take or return more than one tensor"),
        ({"backbone": "hiera_tiny_224"}, r"changes the shape of its input, \[3136, 96\] to \[784"),
        ({"backbone": "convit_tiny", "share": "all"}, "blocks 0 and 10 of blocks cannot share"),
        ({"backbone": "swin_small", "share": 4}, r"share = 4 does not divide its 2 \+ 4 blocks"),
        ({"backbone": "vit_small", "recursions": 50_000}, "200,000 layers are more than"),
        (
            {"backbone": "vit_small_patch16_rope_mixed_224", "loop": "external"},
            r"a second pass fails \(external loop\)",
        ),
    ],
)
def test_a_model_that_cannot_be_made_recursive_is_refused_with_the_reason(values, reason):
    with pytest.raises(SretError, match=f"{values['backbone']} cannot be .*{reason}") as refused:
        build_backbone(BackboneSpec(**{"recursions": 2, **values}))
    assert refused.value.code == 3
    assert "\n" not in str(refused.value)


def test_any_timm_model_can_be_a_baseline():
    model = build_backbone(BackboneSpec(backbone="resnet18", img_size=32, num_classes=10))
    assert count_layers(model) is None
    assert logits(model).shape == (2, 10)
    with pytest.raises(SretError, match="passes cannot be recomputed"):
        model.set_grad_checkpointing()


def test_an_image_size_that_a_model_does_not_take_is_refused():
    spec = BackboneSpec(backbone="levit_128s", img_size=1)
    with pytest.raises(SretError, match="timm cannot build levit_128s with img_size = 1"):
        build_backbone(spec)
