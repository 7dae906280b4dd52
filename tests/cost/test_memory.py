import gc
import itertools
import json
import os

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from sret_cli.cost import footprint
from sret_cli.cost.footprint import Setting
from sret_cli.cost.liveness import trace_storages
from sret_cli.cost.memory import largest_batch, predict_memory, set_recompute
from sret_cli.cost.plan import Plan, fixed_plan
from sret_cli.cost.timing import _check_memory, peak_memory_bytes
from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.train import TrainSpec

DROPS = {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2}
SRET_T_1000 = PRESETS["sret_t"].at(layers=1000)


def loss_of(spec, batch_size, precision, plan, device="cpu"):
    """A model with a plan of recomputation, a function from it to the loss, and its batch."""
    torch.manual_seed(0)
    model = build_model(spec).to(device)
    model.set_recompute(*plan)
    x = torch.randn(batch_size, spec.in_chans, spec.img_size, spec.img_size, device=device)
    target = torch.randint(max(spec.num_classes, 1), (batch_size,), device=device)

    def loss():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output = model(x)
        return F.cross_entropy(output.float(), target, label_smoothing=0.1)

    return model, loss, x.nbytes + target.nbytes


def peak_of(spec, batch_size, precision, plan, device):
    """The most memory that a second training step takes."""
    model, loss, batch = loss_of(spec, batch_size, precision, plan, device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    peak = peak_memory_bytes(step, model, optimizer, torch.device(device))
    return peak + batch if device == "cpu" else peak  # CUDA's allocator has counted the batch


def bytes_left_by(call):
    """What a call has allocated on the CPU, less what it has freed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    gc.collect()  # or models of other tests are freed meanwhile
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as record:
        result = call()
    events = record.profiler.kineto_results.events()
    del result
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "pass", 3, "auto"])
@pytest.mark.parametrize(
    "values",
    [{"recursions": 3}, DROPS, {"nll": "per_pass", "lrc": "per_pass"}, {"residual": "layerscale"}],
    ids=["deep", "dropout", "per_pass", "layerscale"],
)
def test_what_is_kept_for_the_backward_pass_is_predicted_to_the_byte(
    tiny, values, recompute, precision
):
    spec = tiny.with_values(**values)
    memory, plan = predict_memory(spec, Setting(3, precision, "cpu"), recompute)
    _, loss, _ = loss_of(spec, 3, precision, plan)
    loss()
    assert bytes_left_by(loss) == memory.saved_bytes + 4  # and the loss itself


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("residual", ["lrc", "deepnorm"])
def test_what_is_kept_equals_what_autograds_hooks_see(tiny, residual, precision):
    tiny = tiny.with_values(residual=residual)
    memory, plan = predict_memory(tiny, Setting(3, precision, "cpu"))
    model, loss, _ = loss_of(tiny, 3, precision, plan)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = loss()
    classes = 3 * 8  # bytes of the batch; its images are kept as the stem's copy
    seen = sum(size for address, size in kept.items() if address not in own) - classes
    assert result.isfinite()
    assert memory.saved_bytes == seen


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "recompute"), [("fp32", "none"), ("bf16", "auto")])
def test_the_peak_is_predicted_within_a_twentieth(precision, recompute):
    spec = PRESETS["sret_t"].with_values(img_size=112, slices=1, recursive_slices=1)
    memory, plan = predict_memory(spec, Setting(8, precision, "cpu"), recompute)
    seen = peak_of(spec, 8, precision, plan, "cpu")
    assert memory.training_memory_bytes == pytest.approx(seen, rel=0.05)


def inference_of(model, x, precision):
    """What inference has at its peak: weights, batch, and what a second call allocates."""

    def evaluate():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            model(x)

    evaluate()
    labels = 8 * len(x)
    return peak_memory_bytes(evaluate, model, None, torch.device("cpu")) + x.nbytes + labels


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 64, 256])
@pytest.mark.parametrize(
    "values",
    [{}, {"slices": (4, 2, 1), "img_size": 32}, {"residual": "layerscale", "nll": "none"}],
    ids=["nano", "sliced", "layerscale"],
)
def test_the_peak_of_inference_is_predicted_within_a_fiftieth(values, batch_size, precision):
    spec = PRESETS["nano"].with_values(**values)
    x = torch.randn(batch_size, 3, spec.img_size, spec.img_size)
    memory, _ = predict_memory(spec, Setting(batch_size, precision, "cpu"))
    seen = inference_of(build_model(spec).eval(), x, precision)
    assert memory.inference_memory_bytes == pytest.approx(seen, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [("sret_t", "bf16"), ("deep", "fp32")])
def test_the_peak_of_one_images_inference_is_predicted_within_a_fiftieth(name, precision):
    memory, _ = predict_memory(PRESETS[name], Setting(1, precision, "cpu"))
    seen = inference_of(build_model(PRESETS[name]).eval(), torch.randn(1, 3, 224, 224), precision)
    assert memory.inference_memory_bytes == pytest.approx(seen, rel=0.02)


def test_inference_holds_the_map_that_entered_a_stage():
    memory, _ = predict_memory(PRESETS["nano"], Setting(256, "fp32", "cpu"))
    # seen by torch's profiler; 256 maps of 64 tokens, 32 wide, are 2,097,152 of them
    assert memory.inference_memory_bytes == pytest.approx(23_088_032, rel=0.02)


@pytest.mark.slow
def test_inference_in_bf16_keeps_no_copies_of_weights_on_a_gpu_either():
    setting = Setting(1, "bf16", "cuda")
    memory, _ = predict_memory(PRESETS["sret_t"].at(layers=1000), setting)
    rest = memory.inference_memory_bytes - memory.weight_bytes - 32 * 2**20
    assert rest < 5e6  # copies of its weights alone would be 8 MB


@pytest.mark.slow
def test_the_prediction_says_that_inference_is_not_of_the_fused_copy(sret):
    code, out, _ = sret("profile", "--memory", "--preset", "nano")
    assert code == 0
    assert "Inference is of the model as `sret eval` runs it. Its fused copy" in out
    assert "Inference is" not in sret("profile", "--memory", "--backbone", "vit_small")[1]


@pytest.mark.slow
def test_the_parts_of_a_prediction_add_up_to_its_peak(tiny):
    memory, _ = predict_memory(tiny, Setting(8, "bf16", "cuda"))
    parts = (memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes)
    parts += (memory.kept_bytes, memory.transient_bytes)
    assert sum(parts) == memory.training_memory_bytes
    assert memory.inference_memory_bytes < memory.training_memory_bytes


def test_a_thousand_layers_keep_at_most_45_megabytes_an_image():
    setting = Setting(1, "fp32", "cpu")
    deep, plan = predict_memory(SRET_T_1000, setting, "auto")
    assert deep.kept_bytes < 45e6
    assert plan.recomputed[0] == 200
    assert deep.kept_bytes < 2.5 * predict_memory(PRESETS["sret_t"], setting)[0].kept_bytes


def test_depth_is_predicted_from_the_same_traces(monkeypatch, tiny):
    traced = []
    real = trace_storages
    monkeypatch.setattr(footprint, "_traced", {})
    monkeypatch.setattr(
        footprint, "trace_storages", lambda *a, **k: traced.append(k) or real(*a, **k)
    )
    predict_memory(tiny.at(layers=40), Setting(2, "fp32", "cpu"))
    count = len(traced)
    assert count == 2 * (5 + 4)  # first and later passes; stem, pools, head: training, inference
    predict_memory(tiny.at(layers=4000), Setting(64, "fp32", "cpu"), "auto")
    assert len(traced) == count


def test_a_budget_recomputes_no_more_than_it_must():
    setting = Setting(64, "bf16", "cuda")
    spec = PRESETS["sret_t"].at(layers=100)
    none, _ = predict_memory(spec, setting)
    least, least_plan = predict_memory(spec, setting, "auto")
    full = none.training_memory_bytes
    assert least.training_memory_bytes < 0.2 * full
    memory, plan = predict_memory(spec, setting, "auto", full)
    assert (memory, plan) == (none, fixed_plan(spec, "none"))
    recomputed = []
    for share in (0.9, 0.6, 0.3):
        memory, plan = predict_memory(spec, setting, "auto", int(share * full))
        assert memory.training_memory_bytes <= share * full
        recomputed.append(sum(n for n, k in zip(plan.recomputed, plan.segments, strict=True) if k))
    assert recomputed == sorted(recomputed)
    assert recomputed[0] < 30
    memory, plan = predict_memory(spec, setting, "auto", 10**6)  # nothing fits: the least there is
    assert memory.training_memory_bytes == least.training_memory_bytes


def test_the_largest_batch_fits_and_one_more_image_does_not():
    setting, budget = Setting(32, "bf16", "cuda"), 10 * 10**9
    for recompute in ("none", "auto"):
        most = largest_batch(PRESETS["sret_t"], setting, recompute, budget)
        needs = [
            predict_memory(PRESETS["sret_t"], setting._replace(batch_size=n), recompute)[0]
            for n in (most, most + 1)
        ]
        assert needs[0].training_memory_bytes <= budget < needs[1].training_memory_bytes
    assert largest_batch(PRESETS["sret_t"], setting, "none", 10**6) == 0


def test_predicting_changes_no_random_state(tiny):
    state = torch.get_rng_state()
    predict_memory(tiny.with_values(mlp_ratio=2.5, **DROPS), Setting(2, "bf16", "cuda"))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.is_autocast_enabled("cuda")


def test_a_training_recomputes_for_the_most_recursions_it_may_draw(tiny):
    model = build_model(tiny)
    for recompute, segments in (("none", 0), ("pass", 1), (7, 7)):
        set_recompute(model, TrainSpec(recompute=recompute), torch.device("cpu"))
        assert [stage.segment for stage in model.stages] == [segments] * 3
    train = TrainSpec(recompute="auto", recursions_range=(1, 50))
    set_recompute(model, train, torch.device("cpu"))
    assert model.stages[1].recomputed > 80  # of 100 passes


def test_a_batch_that_cannot_fit_says_by_how_much_and_what_would(monkeypatch):
    monkeypatch.setattr("sret_cli.cost.timing.free_bytes", lambda device: 2 * 10**9)
    with pytest.raises(SretError, match=r"needs \d+\.\d GB, .* more than the 2.0 GB") as refused:
        _check_memory(PRESETS["sret_t"], torch.device("cpu"), 512, "fp32")
    assert refused.value.code == 7
    assert "use --batch-size 36" in str(refused.value)


@pytest.mark.parametrize(
    ("value", "message"), [(0, "recompute = 0"), (True, "recompute = True"), ("all", "none, pass")]
)
def test_recompute_is_none_pass_auto_or_a_number_of_passes(value, message):
    with pytest.raises(SretError, match=message):
        TrainSpec(recompute=value)
    assert TrainSpec(recompute=4).recompute == 4


def test_profile_predicts_memory_in_a_row(sret):
    flags = ("--preset", "nano", "--layers", 16, "--batch-size", 64, "--precision", "bf16")
    code, out, _ = sret("profile", "--memory", *flags, "--recompute", "auto", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["memory_device"] == "cuda"
    assert row["memory_batch_size"] == 64
    assert row["training_memory_bytes"] > row["kept_bytes"] > 0
    assert len(row["segments"]) == 3
    assert row["fits"] is None


def test_profile_says_whether_a_batch_fits_and_what_would(sret):
    flags = ("profile", "--preset", "nano", "--memory", "--batch-size", 64)
    code, out, _ = sret(*flags, "--gpu-memory", "10G")
    assert code == 0
    assert "it fits in 10 GB (largest batch: " in out
    code, out, _ = sret(*flags, "--gpu-memory", "40M")
    assert code == 0
    assert "more than 0.04 GB (no batch fits)" in out
    code, _, err = sret("profile", "--preset", "nano", "--gpu-memory", "40M")
    assert code == 2
    assert "--memory" in err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("layers", "slices", "recompute"), list(itertools.product((20, 100), (1, 4), ("none", "auto")))
)
@pytest.mark.parametrize(("batch_size", "precision"), [(32, "fp32"), (128, "bf16")])
def test_the_peak_on_cuda_is_predicted_within_a_tenth(
    layers, slices, recompute, batch_size, precision
):
    spec = PRESETS["sret_t"].at(layers=layers, slices=slices)
    memory, plan = predict_memory(spec, Setting(batch_size, precision, "cuda"), recompute)
    torch.cuda.empty_cache()
    seen = peak_of(spec, batch_size, precision, plan, "cuda")
    assert memory.training_memory_bytes == pytest.approx(seen, rel=0.1)


def test_a_plan_names_segments_and_passes_of_each_stage(tiny):
    assert fixed_plan(tiny, "none") == Plan((0, 0, 0), (2, 4, 2))
    assert fixed_plan(tiny, "pass") == Plan((1, 1, 1), (2, 4, 2))
    assert fixed_plan(tiny, 3) == Plan((3, 3, 3), (2, 4, 2))
