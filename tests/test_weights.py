import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sret_cli.errors import SretError
from sret_cli.model import build_model
from sret_cli.reference import to_reference
from sret_cli.spec import PRESETS
from sret_cli.weights import (
    changed,
    load_model,
    load_reference,
    read_reference,
    resample_pos_embed,
    save_model,
    save_reference,
)

# Logits of the reference implementation, with weights filled by a rule; see `fill`.
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def fill(key, shape):
    """A tensor's values from the first key under which it appears, as the reference was filled."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        return abs(r) * 0.1 + 1
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if ".coefficient" in key:
        return 1 + 0.1 * r
    if key.endswith((".bias", "running_mean")):
        return 0.02 * r
    layer = ("x." + key).rsplit(".", 2)[-2]
    return 1 + 0.02 * r if layer.startswith(("norm", "bn")) else 0.05 * r


def golden_state_dict():
    """The reference's 510 keys: blocks are at even places, and two of them are one shared block."""
    tensors = {}
    for key, shape in GOLDEN["state_dict"]:
        parts = key.split(".")
        if parts[0] == "transformers" and int(parts[3]) % 4 == 2:
            parts[3] = str(int(parts[3]) - 2)
        tensors[key] = torch.tensor(fill(".".join(parts), shape)).float().reshape(shape)
    return tensors


@pytest.fixture(scope="module")
def golden():
    return golden_state_dict()


def small(**values):
    """A model that the reference could be asked for: a stem of stride 8, 2 recursions, NLLs."""
    spec = PRESETS["sret_t"].with_values(
        **{"img_size": 64, "num_classes": 10, "blocks": 1, **values}
    )
    return spec.with_values(embed_dims=(8, 16, 32), num_heads=(1, 2, 4))


def filled(spec):
    """A built model of random weights, coefficients and statistics."""
    torch.manual_seed(1)
    model = build_model(spec)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    return model


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_logits_of_the_reference_are_reproduced(golden, name):
    expected = GOLDEN["models"][name]
    model = build_model(PRESETS[name]).eval()
    assert list(model.spec.slices) == expected["slices"]
    assert list(model.spec.recursive_slices) == expected["recursive_slices"]
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    load_reference(model, golden)
    x = torch.tensor(np.random.RandomState(7).standard_normal((2, 3, 224, 224))).float()
    if expected["shuffle_seed"] is not None:
        model.set_reference_shuffle()
        torch.manual_seed(expected["shuffle_seed"])
    with torch.no_grad():
        logits = model(x)
    first = torch.tensor(expected["logits_first10"])
    torch.testing.assert_close(logits[:, :10], first, atol=1e-5, rtol=0)
    norms = torch.tensor(expected["logits_l2"]).float()
    torch.testing.assert_close(logits.norm(dim=1), norms, atol=1e-5, rtol=0)
    assert logits.argmax(1).tolist() == expected["argmax"]
    assert logits.abs().max().item() == pytest.approx(expected["absmax"], abs=1e-5)


def test_golden_weights_are_recognised_as_sret_t(golden, tmp_path):
    torch.save({"model": golden}, tmp_path / "sret.pth")
    model, name, notes = read_reference(tmp_path / "sret.pth")
    assert (name, model.spec) == ("sret_t", PRESETS["sret_t"])
    assert notes == [
        "recognised sret_t from the shapes; they do not tell slices: took 8-4-1, then 2-1-1 "
        "(--slices or --preset say otherwise)"
    ]
