import pytest
import torch

from sret_cli.model import build_model
from sret_cli.spec import BASE_PRESETS, PRESETS

SMALL = {"img_size": 32, "stem_strides": (1, 2, 1), "num_classes": 10, "slices": 1}


def image(spec, batch=2):
    generator = torch.Generator().manual_seed(0)
    size = (batch, spec.in_chans, spec.img_size, spec.img_size)
    return torch.randn(size, generator=generator)


@pytest.mark.parametrize("name", BASE_PRESETS)
@pytest.mark.parametrize("nll", ["per_pass", "per_block", "none"])
@pytest.mark.parametrize("loop", ["internal", "external"])
def test_output_is_finite_and_every_parameter_gets_a_gradient(name, nll, loop):
    spec = PRESETS[name].with_values(**SMALL, recursive_slices=1, nll=nll, loop=loop)
    torch.manual_seed(0)
    model = build_model(spec)
    output = model(image(spec))
    assert output.shape == (2, 10)
    assert output.isfinite().all()
    output.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "params"), [("sret_t", 4_755_979), ("sret_lt", 4_988_024), ("sret_s", 20_899_692)]
)
def test_presets_have_the_parameters_of_the_reference(name, params):
    assert sum(p.numel() for p in build_model(PRESETS[name]).parameters()) == params


def test_depth_adds_no_parameters_and_no_entries_to_the_state_dict(tiny):
    shallow, deep = build_model(tiny), build_model(tiny.at(layers=400))
    assert len(deep.stages[1].schedule) == 200
    assert deep.state_dict().keys() == shallow.state_dict().keys()
    deep.load_state_dict(shallow.state_dict())


def test_nlls_have_weights_per_pass_per_block_or_none(tiny):
    spec = tiny.with_values(recursions=3)
    banks = {
        nll: build_model(spec.with_values(nll=nll)) for nll in ("per_pass", "per_block", "none")
    }
    assert [len(banks[nll].stages[1].nlls) for nll in banks] == [6, 2, 0]


def test_evaluation_is_deterministic_and_shuffled(tiny):
    spec = tiny.with_values(recursions=3)
    model = build_model(spec).eval()
    plain = build_model(spec.with_values(shuffle="none")).eval()
    plain.load_state_dict(model.state_dict())
    x = image(spec)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert not torch.allclose(model(x), plain(x))


def test_two_models_of_one_spec_shuffle_alike_in_evaluation(tiny):
    spec = tiny.with_values(recursions=3)
    one = build_model(spec)
    torch.manual_seed(123)
    other = build_model(spec)
    rows = one.stages[0].permutations_PN
    assert torch.equal(rows, other.stages[0].permutations_PN)
    assert len({tuple(row.tolist()) for row in rows}) == 2
    assert all(sorted(row.tolist()) == list(range(64)) for row in rows)


def test_training_draws_a_fresh_permutation_at_every_step_unless_it_is_fixed(tiny):
    x = image(tiny)
    outputs = {}
    for shuffle in ("random", "fixed"):
        torch.manual_seed(0)
        model = build_model(tiny.with_values(shuffle=shuffle)).train()
        outputs[shuffle] = [model(x) for _ in range(2)]
    assert not torch.equal(*outputs["random"])
    assert torch.equal(*outputs["fixed"])


def test_attention_stays_inside_its_slices(tiny):
    from sret_cli.model import Attention

    attention = Attention(8, 2, 0.0, 0.0).eval()
    x = torch.randn(1, 16, 8)
    changed = x.clone()
    changed[:, :4] += 1
    same = attention(x, 4, None)[:, 4:] == attention(changed, 4, None)[:, 4:]
    assert same.all()
    assert not torch.allclose(attention(x, 1, None)[:, 4:], attention(changed, 1, None)[:, 4:])


def test_a_shuffle_is_undone_after_attention():
    from sret_cli.model import Attention, inverse

    attention = Attention(8, 2, 0.0, 0.0).eval()
    x, order = torch.randn(1, 16, 8), torch.randperm(16)
    whole = attention(x, 1, None)
    torch.testing.assert_close(attention(x, 1, order), whole)
    assert torch.equal(order[inverse(order)], torch.arange(16))


def test_sliced_attention_equals_attention_on_each_slice_alone():
    from sret_cli.model import Attention

    attention = Attention(8, 2, 0.0, 0.0).eval()
    x = torch.randn(2, 12, 8)
    alone = [attention(part, 1, None) for part in x.split(4, dim=1)]
    torch.testing.assert_close(attention(x, 3, None), torch.cat(alone, dim=1))


def test_checkpointing_leaves_loss_and_gradients_bitwise_as_they_are(tiny):
    spec = tiny.with_values(recursions=3, drop_path_rate=0.3, drop_rate=0.1)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(spec)
        model.set_grad_checkpointing(checkpointing)
        model(image(spec)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_features_head_and_classifier_are_timms(tiny):
    model = build_model(tiny).eval()
    x = image(tiny)
    features = model.forward_features(x)
    assert features.shape == (2, 4, 32)
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    torch.testing.assert_close(model.forward_head(features), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_plain_residuals_have_no_coefficients(tiny):
    names = [name for name, _ in build_model(tiny.with_values(residual="plain")).named_parameters()]
    assert not any("lrc" in name for name in names)
    assert sum("lrc" in name for name, _ in build_model(tiny).named_parameters()) == 8


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    from sret_cli.model import drop_path

    torch.manual_seed(0)
    dropped = drop_path(torch.ones(10_000, 2, 3), 0.25)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_a_thousand_layers_take_a_training_step_with_checkpointing():
    spec = PRESETS["deep"].with_values(num_classes=10).at(layers=1000, slices=4)
    torch.manual_seed(0)
    model = build_model(spec)
    model.set_grad_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    before = model.head.weight.clone()
    x, target = image(spec, batch=1), torch.tensor([3])
    loss = torch.nn.functional.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert not torch.equal(before, model.head.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_logits_of_the_cpu(tiny):
    model = build_model(tiny).eval()
    x = image(tiny)
    with torch.no_grad():
        on_cpu = model(x)
        on_cuda = model.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(on_cuda, on_cpu, atol=1e-3, rtol=1e-3)
