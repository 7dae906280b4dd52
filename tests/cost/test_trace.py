import warnings

import pytest
import torch
from helpers import REFERENCE, UNSLICED
from torch import nn

from sret_cli.cost import trace as profiler
from sret_cli.cost.module_costs import count_module, saved_bytes
from sret_cli.cost.timing import measure_speed
from sret_cli.cost.trace import trace_costs
from sret_cli.model.sret import build_model
from sret_cli.runtime.device import choose_device
from sret_cli.runtime.errors import SretError
from sret_cli.spec.presets import BASE_PRESETS, PRESETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fvcore.nn import FlopCountAnalysis


def full(spec):
    return count_module(build_model(spec), torch.zeros(1, spec.in_chans, *[spec.img_size] * 2))


@pytest.mark.parametrize(("name", "values", "params", "macs"), REFERENCE)
def test_costs_are_those_of_the_reference_to_the_unit(name, values, params, macs):
    costs = trace_costs(PRESETS[name].with_values(**values))
    assert (costs.params, costs.macs) == (params, macs)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASE_PRESETS)
@pytest.mark.parametrize("values", [{}, UNSLICED], ids=["sliced", "unsliced"])
@pytest.mark.parametrize("loop", ["internal", "external"])
def test_traced_signatures_add_up_to_the_full_trace_to_the_unit(name, values, loop):
    spec = PRESETS[name].with_values(**values, loop=loop)
    costs, whole = trace_costs(spec), full(spec)
    assert costs.params == whole.params
    assert costs.macs == whole.macs
    assert costs.activations == whole.activations
    assert costs.activation_bytes == whole.activation_bytes
    assert sum(costs.macs_by_kind().values()) == costs.macs


@pytest.mark.parametrize(
    "values",
    [
        {"nll": "none"},
        {"nll": "per_pass", "recursions": (1, 3, 5)},
        {"residual": "plain"},
        {"shuffle": "fixed", "recursions": 3},
        {"in_chans": 1, "num_classes": 0},
    ],
)
def test_other_designs_add_up_too(values, tiny):
    spec = tiny.with_values(**values)
    costs, whole = trace_costs(spec), full(spec)
    assert (costs.params, costs.macs) == (whole.params, whole.macs)
    assert costs.activation_bytes == whole.activation_bytes


def test_what_is_kept_does_not_depend_on_dropout_nor_on_what_was_traced_before(tiny, monkeypatch):
    plain = trace_costs(tiny).activation_bytes
    monkeypatch.setattr(profiler, "_traced", {})
    assert (
        trace_costs(tiny.with_values(drop_rate=0.1, attn_drop_rate=0.1)).activation_bytes == plain
    )
    assert trace_costs(tiny).activation_bytes == plain


def test_recursion_adds_macs_but_no_parameters():
    shallow, deep = trace_costs(PRESETS["deep"]), trace_costs(PRESETS["deep"].at(layers=1000))
    assert shallow.params == deep.params == 14_657_700
    assert deep.macs > 40 * shallow.macs


def test_each_signature_is_traced_once_whatever_the_depth(monkeypatch, tiny):
    traced = []
    real = count_module
    monkeypatch.setattr(profiler, "_traced", {})
    monkeypatch.setattr(
        profiler, "count_module", lambda module, x: traced.append(module) or real(module, x)
    )
    trace_costs(tiny.at(layers=400))
    # first and later passes, two returns to the tokens' own order; stem, two pools, head
    assert len(traced) == 5 + 2 + 4
    trace_costs(tiny.at(layers=4000))
    assert len(traced) == 5 + 2 + 4


def test_fused_attention_counts_both_of_its_products():
    class Attend(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.zeros(1, 2, 5, 3)  # 2 heads, 5 tokens, 3 wide
    counts = count_module(Attend(), x)
    assert counts.macs == 2 * 2 * 5 * 5 * 3
    assert counts.activations == 2 * 5 * 3
    assert FlopCountAnalysis(Attend(), x).unsupported_ops_warnings(False).total() == 0


def test_counts_of_small_modules_are_those_worked_out_by_hand():
    counts = count_module(nn.Conv2d(3, 4, 3, padding=1), torch.zeros(1, 3, 8, 8))
    assert counts.params == 4 * 3 * 9 + 4
    assert counts.macs == 8 * 8 * 4 * 3 * 9
    assert counts.activations == 4 * 8 * 8
    counts = count_module(nn.Linear(7, 5), torch.zeros(1, 2, 7))
    assert (counts.params, counts.macs, counts.activations) == (40, 2 * 7 * 5, 10)


def test_a_matrix_product_without_a_rule_is_an_error_and_no_gap():
    class Product(nn.Module):
        def forward(self, x):
            return torch.baddbmm(x, x, x)

    with pytest.raises(SretError, match="no rule counts the multiply-adds of aten::baddbmm"):
        count_module(Product(), torch.zeros(1, 4, 4))


def test_saved_bytes_are_what_autograd_keeps():
    class Square(nn.Module):
        def forward(self, x):
            return (x * x).exp()

    # x, kept once although it is saved twice, and the result of exp
    assert saved_bytes(Square(), torch.zeros(1, 10)) == 2 * 10 * 4


def test_counting_changes_neither_the_module_nor_the_random_state():
    norm = nn.BatchNorm2d(2)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    count_module(norm, torch.randn(1, 2, 4, 4))
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    assert norm.training
    state = torch.get_rng_state()
    trace_costs(PRESETS["nano"].with_values(mlp_ratio=2.5))
    assert torch.equal(state, torch.get_rng_state())


def test_speed_and_memory_are_measured_on_a_device(tiny):
    row = measure_speed(tiny, torch.device("cpu"), batch_size=4, precision="fp32")
    assert row["inference_images_per_second"] == pytest.approx(4 / row["forward_seconds"])
    assert row["step_seconds"] > 0 and row["forward_seconds"] > 0
    weights = 4 * trace_costs(tiny).params
    kept = 4 * trace_costs(tiny).activation_bytes
    # weights, gradients and AdamW's two moments, and what 4 images keep
    assert row["peak_memory_bytes"] > 3 * weights + kept
    assert row["peak_memory_bytes"] < 8 * weights + 3 * kept


def test_cuda_that_is_not_there_is_said_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SretError, match="use --device cpu") as refused:
        choose_device("cuda")
    assert refused.value.code == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_and_speed_are_measured_on_cuda():
    spec = PRESETS["sret_t"]
    row = measure_speed(spec, torch.device("cuda"), batch_size=32, precision="bf16")
    assert row["peak_memory_bytes"] > 16 * trace_costs(spec).params
    assert row["step_seconds"] > 0 and row["forward_seconds"] > 0
    assert row["measured_device_name"] == torch.cuda.get_device_name()
