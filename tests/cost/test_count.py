from unittest.mock import Mock

import pytest
import torch
from helpers import REFERENCE, UNSLICED, torch_products
from hypothesis import given, settings
from hypothesis import strategies as st

from sret_cli.cost.budget import fit_width, twin_spec
from sret_cli.cost.count import count, count_passes
from sret_cli.cost.trace import trace_costs
from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.spec.depth import divisors
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.quantity import parse_quantity


def costs(counted):
    return (counted.params, counted.macs, counted.activations, counted.activation_bytes)


@pytest.mark.parametrize(("name", "values", "params", "macs"), REFERENCE)
def test_costs_are_those_of_the_reference_to_the_unit(name, values, params, macs):
    cost = count(PRESETS[name].with_values(**values))
    assert (cost.params, cost.macs) == (params, macs)


def test_costs_of_a_tiny_model_are_those_worked_out_by_hand():
    spec = ModelSpec(
        img_size=4,
        in_chans=1,
        num_classes=3,
        stem_strides=(1, 1, 1),
        embed_dims=(2,),
        num_heads=1,
        blocks=1,
        recursions=1,
        slices=1,
        recursive_slices=1,
        mlp_ratio=1,
        nll="none",
        residual="plain",
    )
    cost = count(spec)
    stem, attention, mlp, head = (10 + 2) + (20 + 4) + (38 + 4), 18 + 6, 6 + 6, 4 + 9
    assert cost.params == stem + 32 + 2 * 4 + attention + mlp + head == 167
    stem, projections, attention, mlp, head = 144 + 288 + 576, 192 + 64, 2 * 16 * 16 * 2, 2 * 64, 6
    assert cost.products == stem + projections + attention + mlp + head == 2422
    # BatchNorm 2 an element, LayerNorm 5, pooling 1
    assert cost.elements == 2 * 16 * (1 + 2 + 2) + 2 * 5 * 32 + 32 + 5 * 2 == 522
    assert cost.macs == 2422 + 522
    assert cost.activations == (16 + 32 + 32) + 96 + 32 + 32 + 2 * 32 + 3 == 307
    stem = (16 + 16 + 2) + (16 + 32 + 4) + (32 + 32 + 4) + 32
    attention, mlp = (32 + 32) + 32 + (96 + 16) + 32, (32 + 32) + 32 + 32 + 32
    assert cost.activation_bytes == 4 * (stem + attention + mlp + (2 + 2) + 2) == 2368


def test_recursion_adds_macs_but_no_parameters():
    shallow, deep = count(PRESETS["deep"]), count(PRESETS["deep"].at(layers=1000))
    assert shallow.params == deep.params == 14_657_700
    assert deep.macs > 40 * shallow.macs


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("values", [{}, UNSLICED], ids=["sliced", "unsliced"])
@pytest.mark.parametrize("loop", ["internal", "external"])
def test_presets_cost_what_fvcore_and_autograd_say(name, values, loop):
    spec = PRESETS[name].with_values(**values, loop=loop)
    assert costs(count(spec)) == costs(trace_costs(spec))


@pytest.mark.parametrize("values", [{"nll": "per_pass"}, {"shuffle": "fixed"}])
def test_a_thousand_layers_cost_what_fvcore_and_autograd_say(values):
    spec = PRESETS["deep"].with_values(**values).at(layers=1000)
    assert costs(count(spec)) == costs(trace_costs(spec))


@st.composite
def specs(draw):
    """Small specs of every kind; the stem leaves BatchNorm more than one token."""
    stages = draw(st.integers(1, 3))
    dims = [draw(st.sampled_from((2, 4, 6, 12)))]
    while len(dims) < stages:
        dims.append(dims[-1] * draw(st.integers(1, 3)))

    def each(strategy):
        return draw(st.tuples(*[strategy] * stages))

    values = {
        "img_size": draw(st.integers(9, 24)),
        "in_chans": draw(st.integers(1, 4)),
        "num_classes": draw(st.integers(0, 5)),
        "stem_strides": draw(st.tuples(*[st.sampled_from((1, 2))] * 3)),
        "embed_dims": tuple(dims),
        "num_heads": tuple(draw(st.sampled_from(divisors(dim))) for dim in dims),
        "blocks": each(st.integers(1, 3)),
        "recursions": each(st.integers(1, 3)),
        "slices": 1,
        "recursive_slices": 1,
        "loop": draw(st.sampled_from(("internal", "external"))),
        "shuffle": draw(st.sampled_from(("random", "fixed", "none"))),
        "mlp_ratio": draw(st.sampled_from((0.5, 1.0, 3.6))),
        "nll": draw(st.sampled_from(("per_pass", "per_block", "none"))),
        "nll_ratio": draw(st.sampled_from((0.5, 1.0, 2.4))),
        "residual": draw(st.sampled_from(("lrc", "plain"))),
        "drop_rate": draw(st.sampled_from((0.0, 0.1))),
    }
    spec = ModelSpec(**values)
    fitting = [st.sampled_from(divisors(tokens)) for tokens in spec.tokens]
    return spec.with_values(
        slices=tuple(map(draw, fitting)), recursive_slices=tuple(map(draw, fitting))
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(specs())
def test_any_spec_costs_what_fvcore_autograd_and_torch_say(spec):
    cost = count(spec)
    assert costs(cost) == costs(trace_costs(spec))
    model = build_model(spec).eval()
    assert cost.params == sum(p.numel() for p in model.parameters())
    images = torch.zeros(1, spec.in_chans, spec.img_size, spec.img_size)
    assert cost.products == torch_products(model, images)


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        *(("14M", 14_000_000), ("4.2G", 4_200_000_000), ("3.5k", 3_500), ("2T", 2 * 10**12)),
        *((" 7 ", 7), (14e6, 14_000_000), (123, 123), ("0.1234567K", 123)),
    ],
)
def test_quantities_are_read_with_their_suffix(text, quantity):
    assert parse_quantity(text) == quantity


@pytest.mark.parametrize("text", ["14X", "", "M", "-3M", "1e6", "4,2G", "nan", "14 M B", True, [1]])
def test_nonsense_is_no_quantity(text):
    with pytest.raises(SretError, match="is not a quantity; write a positive number") as refused:
        parse_quantity(text)
    assert refused.value.code == 3


@pytest.mark.parametrize("text", ["0", "0.0G", 0, "0.4"])
def test_a_quantity_is_at_least_one(text):
    with pytest.raises(SretError, match="is rounded to 0; give 1 or more"):
        parse_quantity(text)


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_fits_its_own_budget(name):
    spec, cost = PRESETS[name], count(PRESETS[name])
    assert fit_width(spec, params=cost.params) == spec
    assert fit_width(spec, macs=cost.macs) == spec


@pytest.mark.parametrize(
    ("name", "budget", "dims", "heads", "met"),
    [
        ("nano", {"params": 1_300_000}, (64, 128, 256), (2, 4, 8), 1_305_698),  # heads as wide
        ("sret_t", {"params": 14_000_000}, (112, 224, 448), (2, 4, 8), 14_115_248),  # as many heads
        ("sret_s", {"params": 14_200_000}, (104, 208, 416), (2, 4, 8), 14_336_960),  # 52, once 42
        ("sret_t", {"macs": 4_200_000_000}, (130, 260, 520), (2, 4, 8), 4_237_184_120),
    ],
)
def test_a_budget_sets_the_width_and_nothing_else(name, budget, dims, heads, met):
    fitted = fit_width(PRESETS[name], **budget)
    assert fitted == PRESETS[name].with_values(embed_dims=dims, num_heads=heads)
    ((kind, wanted),) = budget.items()
    assert getattr(count(fitted), kind) == met
    assert abs(met - wanted) <= 0.01 * wanted


def test_a_budget_between_two_widths_names_both():
    with pytest.raises(SretError) as refused:
        fit_width(PRESETS["deep"], params=14_000_000)
    assert str(refused.value) == (
        "no width has 14,000,000 params within 1 %: embed_dims (124, 248, 496) has 13,776,344 and "
        "embed_dims (126, 252, 504) has 14,213,608; ask for the params of one of these, or change "
        "blocks or mlp_ratio"
    )
    assert fit_width(PRESETS["deep"], params=14_213_608).embed_dims == (126, 252, 504)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"params": 3}, r"within 1 %: embed_dims \(2, 4, 8\) has 14,988; ask"),
        ({"macs": 10**15}, r"within 1 %: embed_dims \(16384, 32768, 65536\) has [\d,]+; ask"),
        ({}, "one budget"),
        ({"params": 14, "macs": 14}, "one budget: give params \\(14\\) or macs \\(14\\)"),
    ],
)
def test_a_budget_that_no_width_meets_is_refused(budget, message):
    with pytest.raises(SretError, match=message) as refused:
        fit_width(PRESETS["deep"], **budget)
    assert refused.value.code == 3


@pytest.mark.parametrize("layers", [20, 1000])
def test_a_budget_is_solved_for_by_few_counts_whatever_the_depth(layers, monkeypatch):
    spec, counted = PRESETS["deep"].at(layers=layers), Mock(wraps=count_passes)
    monkeypatch.setattr("sret_cli.cost.budget.count_passes", counted)
    fit_width(spec, params=14_213_608)
    # Twice 13: with heads as wide as before, then with as many, the range of widths is halved.
    assert counted.call_count == 26


def test_the_layers_twin_is_the_same_layers_untied():
    spec = PRESETS["sret_t"].with_values(loop="external")
    control = twin_spec(spec, "layers")
    assert control == spec.with_values(
        blocks=(4, 10, 6), recursions=1, loop="internal", recursive_slices=(8, 4, 1)
    )
    assert control.layers == spec.layers == 20
    assert sum(p.numel() for p in build_model(control).parameters()) == count(control).params
    deep = PRESETS["deep"]
    assert count(twin_spec(deep, "layers")).macs == count(deep).macs


SHARED = [
    *(PRESETS[name] for name in PRESETS),
    *(PRESETS["deep"].at(layers=layers) for layers in (108, 1000)),
    *(PRESETS["nano"].with_values(recursions=count) for count in (3, 8, 16)),
    PRESETS["sret_t"].with_values(recursions=(1, 4, 2), nll="none", residual="plain"),
]


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("spec", SHARED)
def test_a_twin_matches_within_one_percent_and_shares_nothing(spec, kind):
    control = twin_spec(spec, kind)
    wanted, found = getattr(count(spec), kind), getattr(count(control), kind)
    assert abs(found - wanted) <= 0.01 * wanted
    assert set(control.recursions) == {1}
    assert control.layers <= spec.layers
    ratios = [width / control.embed_dims[0] for width in control.embed_dims]
    assert ratios == [width / spec.embed_dims[0] for width in spec.embed_dims]


def test_twins_keep_their_layers_where_a_width_matches():
    deep = PRESETS["deep"]
    assert twin_spec(deep, "macs") == twin_spec(deep, "layers")
    control = twin_spec(deep, "params")  # no width of 20 layers does: 88 has too few, 92 too many
    assert (control.embed_dims, control.blocks) == ((92, 184, 368), (3, 10, 6))
    assert (control.num_heads, count(control).params) == ((2, 4, 8), 14_750_830)


@pytest.mark.parametrize("kind", ["layers", "params", "macs"])
def test_a_model_that_shares_nothing_is_its_own_twin(kind):
    spec = PRESETS["sret_t"].with_values(recursions=1, loop="external")
    assert twin_spec(spec, kind) == spec


def test_a_twin_that_cannot_be_says_why():
    with pytest.raises(SretError, match="unknown twin 'layer'; did you mean 'layers'"):
        twin_spec(PRESETS["deep"], "layer")
    narrow = ModelSpec(
        img_size=16,
        embed_dims=(2,),
        num_heads=(1,),
        blocks=(1,),
        recursions=(2,),
        slices=(1,),
        recursive_slices=(1,),
        mlp_ratio=1,
        nll="per_pass",
        num_classes=0,
    )
    with pytest.raises(SretError) as refused:
        twin_spec(narrow, "params")
    assert refused.value.code == 3
    assert str(refused.value) == (
        "no untied model has the shared one's 192 params within 1 %: embed_dims (2,) has 240; "
        "take the layers twin, or a wider model"
    )
