"""One test for each private API of torch that `weights` uses; each names what has changed."""

import zipfile

import torch
from torch import nn

from sret_cli.weights.safe_read import NAMES, TYPES, _names


def test_the_scan_operator_is_exported_as_one_loop():
    class Looped(nn.Module):
        def forward(self, x):
            rounds = torch.arange(5.0)[:, None]
            (y,) = torch.ops.higher_order.scan(lambda x, one: [x * 2 + one], [x], [rounds], ())
            return y

    x = torch.ones(3)
    program = torch.export.export(Looped(), (x,), strict=False)
    expected = x
    for one in range(5):
        expected = expected * 2 + one
    assert torch.equal(program.module()(x), expected)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("scan") == 1
    assert not any("mul" in target for target in targets)  # it is inside the loop


def test_torch_save_writes_tensors_and_parameters_by_the_names_that_are_allowed(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(2), "b": nn.Parameter(torch.ones(3).bfloat16())}, path)
    names = _names(path, path.stat().st_size)
    assert all(name in NAMES or TYPES.fullmatch(name) for name in names)
    assert {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"} <= names
    assert any(name.endswith("/data.pkl") for name in zipfile.ZipFile(path).namelist())
