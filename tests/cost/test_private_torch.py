"""One test for each private API of torch that the costs use; each names what has changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sret_cli.cost.allocations import most_allocated
from sret_cli.cost.storages import CAST, GRADIENT, Call, StorageLog, fake_module, run_backward


def log_of(forward, module=None, device="cpu", precision="fp32", dtype=torch.float32):
    """What a log records of a call with a batch of 2 samples of 4 x 8 numbers."""
    call = Call(forward, (4, 8), dtype)
    with fake_module(device):
        model = nn.Identity() if module is None else module()
        return StorageLog(model, device).record(call, 2, precision, True)


def test_fake_tensors_have_shapes_on_cuda_without_a_gpu():
    with fake_module("cuda"):
        x = torch.empty(3, 5)
        assert (x.device.type, (x @ x.T).shape) == ("cuda", (3, 3))


def test_torch_dispatch_mode_sees_every_storage():
    log = log_of(lambda model, x, ones: (x + 1).relu().view(2, 32))
    # The input, its sum and the relu of that; the view adds none. The gradients follow.
    assert log.sizes[:3] == [2 * 4 * 8 * 4] * 3
    assert log.forward == ((0, 1), (1, 1), (2, 1), (1, -1), (0, -1))
    assert log.output == 2


def test_views_have_the_address_of_their_storage():
    with fake_module("cpu"):
        x, other = torch.empty(4), torch.empty(4)
        assert x.untyped_storage()._cdata == x[1:].untyped_storage()._cdata
        assert x.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_copies_of_weights_in_bf16_are_seen_as_to_copy():
    log = log_of(lambda model, x, ones: model(x), lambda: nn.Linear(8, 3), precision="bf16")
    copies = zip(log.kinds, log.weights, log.sizes, strict=True)
    assert [(n, size) for kind, n, size in copies if kind == CAST] == [("bias", 6), ("weight", 48)]
    assert log.kinds.count(GRADIENT) == 2
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_can_be_set_for_a_device_that_does_not_exist():
    log = log_of(lambda model, x, ones: x @ x.transpose(1, 2), device="cuda", precision="bf16")
    assert log.output_dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cuda")


def test_calling_the_nodes_of_autograd_gives_its_gradients_in_its_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 8))
    x = torch.randn(4, 8, requires_grad=True)
    found, order = {}, []

    def on_leaf(leaf, gradient):
        found[leaf] = gradient.clone()
        order.append(tuple(leaf.shape))

    output = model(x) + x
    for _ in run_backward(output.grad_fn, [torch.ones(4, 8)], on_leaf):
        pass
    (model(x) + x).sum().backward()
    for leaf in (x, *model.parameters()):
        torch.testing.assert_close(found[leaf], leaf.grad, rtol=0, atol=0)
    assert order[0] == (8,)  # the bias of the last layer


def test_nodes_of_autograd_have_a_sequence_number_and_the_shapes_of_their_inputs():
    x = torch.ones(2, 3, requires_grad=True)
    first = x.exp()
    second = first.sum(1)
    assert second.grad_fn._sequence_nr() > first.grad_fn._sequence_nr()
    (metadata,) = second.grad_fn._input_metadata
    assert (list(metadata.shape), metadata.dtype) == ([2], torch.float32)


@pytest.mark.parametrize(
    ("device", "dtype", "extra"),
    [
        ("cpu", torch.float32, 2 * 4 * 4),  # one number for each token, padded by no kernel
        ("cuda", torch.float32, 2 * 32 * 4),  # for each token, rounded up to 32 tokens
        ("cuda", torch.bfloat16, 2 * 4 * 4),
    ],
)
def test_the_fused_attention_kernels_keep_one_number_for_each_token(device, dtype, extra):
    def attend(model, x, ones):
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q)

    log = log_of(attend, device=device, dtype=dtype)
    assert log.sizes[1] == 2 * 4 * 8 * dtype.itemsize
    assert extra in log.sizes


def test_kineto_reports_each_allocation_and_release():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        return torch.empty(300, dtype=torch.uint8), second

    assert most_allocated(call) == 1500
    assert most_allocated(lambda: None) == 0
