import pytest
import torch

from sret_cli.model import linear
from sret_cli.model.linear import ONEDNN, Linear, product


@pytest.fixture
def seen(monkeypatch):
    """How often oneDNN multiplied."""
    calls, real = [], product
    monkeypatch.setattr(linear, "product", lambda *a: calls.append(a) or real(*a))
    return calls


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_torch_still_has_the_onednn_linear_that_linear_py_uses():
    assert ONEDNN
    assert str(torch.ops.mkldnn._linear_pointwise.default._schema) == (
        "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, "
        "str? algorithm) -> Tensor Y"
    )


@pytest.mark.skipif(not ONEDNN, reason="torch without oneDNN")
def test_large_products_and_their_gradients_use_onednn_and_equal_torchs(seen):
    torch.manual_seed(0)
    ours, plain = Linear(128, 256), torch.nn.Linear(128, 256)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 64, 128, requires_grad=True)  # 8,388,608 multiply-adds
    y = x.detach().clone().requires_grad_()
    weights = torch.randn(4, 64, 256)
    (ours(x) * weights).sum().backward()
    (plain(y) * weights).sum().backward()
    assert len(seen) == 3
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(x.grad, y.grad)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    ours(x).sum().backward()  # a gradient that is one number, expanded
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), plain(x))


def test_small_products_bf16_and_traces_use_torchs_linear(seen):
    layer = Linear(128, 256)
    large, small = torch.randn(4, 64, 128), torch.randn(4, 63, 128)
    layer(small)
    with torch.autocast("cpu", torch.bfloat16):
        layer(large)
    graph = torch.jit.trace(layer, large, check_trace=False).graph
    program = torch.export.export(layer, (large,))
    assert seen == []
    assert "aten::linear" in str(graph)
    assert "aten.linear" in str(program)


def test_only_requested_gradients_are_computed(seen):
    layer, x = Linear(128, 256).requires_grad_(False), torch.randn(4, 64, 128, requires_grad=True)
    layer(x).sum().backward()
    assert len(seen) == (2 if ONEDNN else 0)
    assert layer.weight.grad is None
    assert x.grad is not None
