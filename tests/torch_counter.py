"""What torch's own counter says of a model, with what the release at hand leaves out."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop


def counted(function, *arguments, rules=None):
    with FlopCounterMode(display=False, custom_mapping=rules) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops()


def missing_rules():
    """A rule for fused attention on a CPU, where the release counts it as nothing."""
    q = torch.zeros(1, 2, 8, 4)
    expected = 2 * 2 * (2 * 8 * 8 * 4)  # two products of 2 heads, two for a multiply-add
    found = counted(F.scaled_dot_product_attention, q, q, q)
    assert found in (0, expected)
    return {} if found else {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}


def products(model, images):
    """Multiply-adds of the matrix products and convolutions of one call; norms count nothing."""
    return counted(model, images, rules=missing_rules()) / 2


def test_the_counter_counts_fused_attention_whatever_the_release():
    q = torch.zeros(1, 2, 8, 4)
    assert counted(F.scaled_dot_product_attention, q, q, q, rules=missing_rules()) == 1024
