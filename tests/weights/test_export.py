import json
import os
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from helpers import write_export

from sret_cli.model.sret import build_model
from sret_cli.model.stage import Stage
from sret_cli.runtime.errors import SretError
from sret_cli.spec.presets import PRESETS
from sret_cli.weights import export
from sret_cli.weights.export import write_onnx, write_torch_export
from sret_cli.weights.origin import Origin, Preparation
from sret_cli.weights.program import Cycle, LoopedStage, find_cycles, to_program
from sret_cli.weights.store import save_model

FORMATS = ("safetensors", "torch-export", "onnx")
CLASSES = ("cat", "vieux chien | x", "3")


def random_model(spec):
    """A model none of whose weights is what another's is."""
    torch.manual_seed(0)
    model = build_model(spec).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.05 * torch.randn_like(tensor)
    return model


@pytest.fixture(scope="module")
def recursive(tiny):
    """Eight passes of the first block, six of the others; slices and shuffles."""
    return random_model(tiny.with_values(recursions=(8, 6, 6)))


@pytest.fixture(scope="module")
def exported(recursive, tmp_path_factory):
    """That model in each format."""
    root = tmp_path_factory.mktemp("exported")
    return {to: write_export(recursive, to, root / to) for to in FORMATS}


def onnx_logits(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def assert_same(model, found, images):
    with torch.no_grad():
        torch.testing.assert_close(found, model(images), atol=1e-4, rtol=0)


def weights_of(file):
    """Bytes of each constant of an ONNX file that is as large as a weight matrix."""
    found = [i.raw_data for i in onnx.load(file).graph.initializer]
    return [data for data in found if len(data) >= 4 * 8 * 8]


def test_a_schedule_is_found_to_be_cycles():
    assert find_cycles("abbbbc") == [Cycle(0, 1, 1), Cycle(1, 1, 4), Cycle(5, 1, 1)]
    assert find_cycles("ababab") == [Cycle(0, 2, 3)]
    assert find_cycles("aabaab") == [Cycle(0, 3, 2)]
    assert find_cycles("aaaaaa") == [Cycle(0, 1, 6)]
    assert find_cycles("abc") == [Cycle(0, 1, 1), Cycle(1, 1, 1), Cycle(2, 1, 1)]
    assert find_cycles("") == []


@pytest.mark.slow
def test_exporting_loads_no_fvcore_and_no_costs():
    code = (
        "import sret_cli.weights.export, sret_cli.weights.convert, sys; "
        "print(*[n for n in sys.modules if n.startswith(('fvcore', 'sret_cli.cost'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_safetensors_come_back_bitwise(exported):
    written = exported["safetensors"]
    assert written.logits_difference == 0.0
    assert sorted(os.listdir(written.file.parent)) == [
        *("README.md", "config.json", "model.safetensors"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_torch_export_takes_any_batch_and_gives_the_models_logits(recursive, exported, batch):
    images = torch.randn(batch, 3, 16, 16)
    program = torch.export.load(exported["torch-export"].file).module()
    assert_same(recursive, program(images), images)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_onnx_takes_any_batch_and_gives_the_models_logits(recursive, exported, batch):
    images = torch.randn(batch, 3, 16, 16)
    onnx.checker.check_model(exported["onnx"].file, full_check=True)
    assert_same(recursive, onnx_logits(exported["onnx"].file, images), images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"loop": "external", "lrc": "per_pass", "recursions": 3},
        {"nll": "per_pass", "recursions": 2},
        {"order": ((0, 0, 1, 0, 0, 1),) * 3, "blocks": 2, "residual": "layerscale"},
        {"residual": "deepnorm", "nll": "none", "shuffle": "none", "recursions": 3},
    ],
    ids=["external", "per_pass", "order", "deepnorm"],
)
def test_every_schedule_is_exported_as_it_is(tiny, values):
    model = random_model(tiny.with_values(**values))
    images = torch.randn(3, 3, 16, 16)
    assert_same(model, to_program(model).module()(images), images)


@pytest.mark.slow
def test_shared_weights_stand_once_in_the_file(tiny, tmp_path):
    models = [random_model(tiny.with_values(recursions=count)) for count in (3, 21)]
    # 18 more permutations of 64 tokens in stage 1 and 36 of 16 in stage 2, as int64.
    permutations_bytes = 18 * 64 * 8 + 36 * 16 * 8
    for to, write in (("torch-export", write_torch_export), ("onnx", write_onnx)):
        sizes = []
        for model in models:
            write(model, tmp_path / to)
            sizes.append((tmp_path / to).stat().st_size)
        assert 0 < sizes[1] - sizes[0] < permutations_bytes + 1000
    weights = weights_of(tmp_path / "onnx")
    assert len(weights) == len(set(weights))


@pytest.mark.slow
def test_a_file_names_no_path_of_this_machine(exported):
    for written in exported.values():
        assert (
            os.path.dirname(os.path.dirname(export.__file__)).encode()
            not in written.file.read_bytes()
        )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_a_program_with_other_logits_is_refused_and_leaves_nothing(
    recursive, tmp_path, monkeypatch, to
):
    monkeypatch.setattr(
        LoopedStage,
        "_compose",
        lambda self, orders_PN: Stage._compose(self, orders_PN).roll(1, 1),
    )
    with pytest.raises(SretError, match=f"logits of the {to} program differ .* more than 0.0001"):
        write_export(recursive, to, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_model_that_is_not_finite_is_refused(tiny, tmp_path):
    model = random_model(tiny)
    with torch.no_grad():
        model.pos_embed[0] = float("nan")
    with pytest.raises(SretError, match="logits are not finite"):
        write_export(model, "safetensors", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_card_says_what_the_model_is_and_how_well_it_does(recursive, tmp_path):
    digits = Preparation((0.305,) * 3, (0.376,) * 3, "bicubic", 0.875)
    row = {
        **{"train.dataset": "digits", "train.seed": 3, "epochs_trained": 15, "final_loss": 0.5},
        **{"top1_percent": 98.6111, "top5_percent": 100.0, "test_loss": 0.15, "test_images": 360},
    }
    origin = Origin("tiny", "depths", "0123456789", classes=CLASSES, preparation=digits, row=row)
    write_export(recursive, "safetensors", tmp_path / "out", origin)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        *("# tiny", "license: mit", "| Layers | 26 |", "| Data | digits |", "| Seed | 3 |"),
        *("| Top-1 (%) | 98.61 |", "| `recursions` | 8-6-6 |", "| `embed_dims` | 8-16-32 |"),
        *("FLOPs: one multiply-add counts as one.", "2111.05297"),
        "normalised by mean 0.305, 0.305, 0.305 and deviation 0.376, 0.376, 0.376",
        "These are the weights of the run `0123456789` of the study `depths`.",
        '["cat", "vieux chien | x", "3"]',
    ):
        assert line in card


@pytest.mark.slow
def test_flags_export_an_untrained_model(sret):
    code, out, _ = sret("export", "--preset", "nano", "--layers", 40, "--to", "torch-export")
    assert (code, out.partition(":")[0]) == (0, "exports/nano-torch-export/model.pt2")
    assert "No training is recorded" in open("exports/nano-torch-export/README.md").read()


def test_a_directory_is_exported_and_its_numbers_printed(sret, recursive, tmp_path):
    save_model(recursive, tmp_path / "built")
    code, out, err = sret("export", "built", "--out", "there", "--json")
    written = json.loads(out)
    assert (code, err) == (0, "")
    assert written["file"] == "there/model.safetensors"
    assert written["logits_difference"] == 0.0
    assert written["file_bytes"] == os.path.getsize("there/model.safetensors")


def test_bad_input_is_one_line(sret, recursive, tmp_path, monkeypatch):
    save_model(recursive, tmp_path / "built")
    (tmp_path / "full").mkdir()
    for arguments, code, text in [
        (("nowhere",), 5, "nowhere has no config.json"),
        (("built", "--to", "onyx"), 2, "unknown format 'onyx'; did you mean 'onnx'?"),
        (("built", "--out", "full"), 2, "full already exists; choose another directory"),
        (("built", "--out", "a.onnx"), 2, "--out a.onnx looks like a file"),
        (("built", "--layers", 40), 2, "built is a whole model; leave out layers"),
        ((), 4, "no directory runs"),
    ]:
        found, out, err = sret("export", *arguments)
        assert (found, out, err.count("\n")) == (code, "", 1)
        assert err.startswith(f"sret: {text}")
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert sret("export", "built", "--to", "onnx") == (
        *(2, ""),
        "sret: --to onnx needs onnxscript; install it with pip install 'sret[onnx]'\n",
    )
    assert not (tmp_path / "exports").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_a_thousand_layers_fit_into_75_mb(tmp_path, monkeypatch, to):
    # The check would run a thousand layers twice; small models are checked above.
    monkeypatch.setattr(export, "logits_difference", lambda model, to, path: 0.0)
    model = build_model(PRESETS["deep"].at(layers=1000, slices=4))
    written = write_export(model, to, tmp_path / "out")
    assert 14_657_700 * 4 < written.file_bytes < 75_000_000
