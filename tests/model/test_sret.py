import pytest
import torch

from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import SretError
from sret_cli.spec.presets import BASE_PRESETS, PRESETS

SMALL = {"img_size": 32, "stem_strides": (1, 2, 1), "num_classes": 10, "slices": 1}


def image(spec, batch=2):
    generator = torch.Generator().manual_seed(0)
    size = (batch, spec.in_chans, spec.img_size, spec.img_size)
    return torch.randn(size, generator=generator)


@pytest.mark.slow
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


def test_two_models_of_one_spec_shuffle_the_same_in_evaluation(tiny):
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
    from sret_cli.model.blocks import Attention

    attention = Attention(8, 2, 0.0, 0.0).eval()
    x = torch.randn(1, 16, 8)
    changed = x.clone()
    changed[:, :4] += 1
    same = attention(x, 4)[:, 4:] == attention(changed, 4)[:, 4:]
    assert same.all()
    assert not torch.allclose(attention(x, 1)[:, 4:], attention(changed, 1)[:, 4:])


def test_keeping_tokens_shuffled_equals_restoring_their_order_after_each_pass(tiny):
    spec = tiny.with_values(recursions=3, loop="external")
    model = build_model(spec).eval()
    x = image(spec)
    stage = model.stages[1]
    tokens = torch.randn(2, 16, 16)
    rows = iter(stage.permutations_PN)
    expected = tokens
    for index, p in enumerate(stage.schedule):
        order = next(rows) if p.shuffled else torch.arange(16)
        shuffled = stage.run_pass(expected[:, order], index)
        expected = shuffled[:, order.argsort()]
    assert [p.gathers for p in stage.schedule] == [False] * 2 + [True] * 4
    with torch.no_grad():
        torch.testing.assert_close(stage(tokens), expected)
        assert torch.equal(model(x), model(x))


def test_each_gather_leads_from_one_order_of_tokens_to_the_next(tiny):
    stage = build_model(tiny.with_values(recursions=3)).stages[1]
    assert [p.gathers for p in stage.schedule] == [False, True, True, True, True, True]
    x, seen = torch.arange(16), []
    for row in stage.gathers_RN:
        x = x[row]
        seen.append(x.tolist())
    own, orders = list(range(16)), stage.permutations_PN.tolist()
    # two shuffled passes of block 0, the first of block 1 in the tokens' own order, and so on
    assert seen == [orders[0], orders[1], own, orders[2], orders[3], own]


def test_sliced_attention_equals_attention_on_each_slice_alone():
    from sret_cli.model.blocks import Attention

    attention = Attention(8, 2, 0.0, 0.0).eval()
    x = torch.randn(2, 12, 8)
    alone = [attention(part, 1) for part in x.split(4, dim=1)]
    torch.testing.assert_close(attention(x, 3), torch.cat(alone, dim=1))


def gradients_of(spec, segments, recomputed=None, wrap=lambda model: model, autocast=False):
    """Loss and gradients of one step from the same seed, with some recomputation."""
    torch.manual_seed(0)
    model = build_model(spec)
    model.set_recompute(segments, recomputed)
    model.set_recursions(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = wrap(model)(image(spec)).float().square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("segments", "recomputed"),
    [((1, 1, 1), None), ((2, 5, 3), None), ((2, 2, 0), None), ((9, 4, 1), (2, 6, 2))],
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "values",
    [{"drop_path_rate": 0.3, "drop_rate": 0.1, "attn_drop_rate": 0.1}, {"lrc": "per_pass"}],
)
def test_recomputation_keeps_loss_and_gradients_bitwise_the_same(
    tiny, segments, recomputed, autocast, values
):
    spec = tiny.with_values(recursions=4, **values)
    plain = gradients_of(spec, (0, 0, 0), autocast=autocast)
    again = gradients_of(spec, segments, recomputed, autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputation_keeps_gradients_the_same_in_parallel_training(tiny, tmp_path):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    spec = tiny.with_values(recursions=4, drop_path_rate=0.3)
    plain = gradients_of(spec, (0, 0, 0))
    distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        again = gradients_of(spec, (2, 3, 1), wrap=DistributedDataParallel)
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_graph_that_is_kept_goes_backward_twice(tiny):
    model = build_model(tiny)
    model.set_recompute((2, 2, 2))
    loss = model(image(tiny)).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(2 * a, p.grad) for a, p in zip(once, model.parameters(), strict=True))


def test_shuffles_and_drop_path_are_drawn_before_the_first_pass(tiny, monkeypatch):
    stage = build_model(tiny.with_values(recursions=3, drop_path_rate=0.5)).stages[0]
    drawn, real = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **b: drawn.append(a) or real(*a, **b))
    stage(torch.randn(5, 64, 8))
    assert drawn == [(2, 64), (3, 2, 5, 1)]  # two shuffled passes; two branches of three passes
    stage.eval()(torch.randn(5, 64, 8))
    assert len(drawn) == 2


def test_features_head_and_classifier_follow_timm(tiny):
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


def test_drop_path_drops_whole_samples_and_keeps_the_mean(tiny):
    torch.manual_seed(0)
    stage = build_model(tiny.with_values(drop_path_rate=0.25)).stages[2]
    assert stage.drop_path_rates == pytest.approx((0.25 * 6 / 7, 0.25))
    dropped = stage._drop_path(torch.zeros(10_000, 4, 32))[1]
    assert dropped.shape == (2, 10_000, 1, 1)
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(dropped[0], dropped[1])
    block, x = stage.blocks[0], torch.randn(3, 4, 32)
    drops = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]).view(2, 3, 1, 1)
    y = block(x, 1, drops)
    assert torch.equal(y[0], x[0])
    attended = x + 2 * block.attn(block.norm1(x), 1)
    torch.testing.assert_close(y[1], attended[1])
    torch.testing.assert_close(y[2], (x + 2 * block.mlp(block.norm2(x)))[2])


def test_lrc_per_pass_has_four_scalars_for_each_pass(tiny):
    spec = tiny.with_values(recursions=3, lrc="per_pass")
    model = build_model(spec)
    assert [stage.lrc_P4.shape for stage in model.stages] == [(3, 4), (6, 4), (3, 4)]
    names = {name for name, _ in model.named_parameters() if "lrc" in name and "nlls" not in name}
    assert names <= model.no_weight_decay()
    x = image(spec)
    plain = build_model(tiny.with_values(recursions=3)).eval()
    plain.load_state_dict({**model.state_dict(), **lrc_of_blocks(plain)}, strict=False)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain(x))  # both start at 1
        model.stages[1].lrc_P4[5, 3] = 2.0
        assert not torch.equal(model(x), plain(x))


def lrc_of_blocks(model):
    return {k: v for k, v in model.state_dict().items() if k.endswith("lrc") and "blocks" in k}


def test_a_branch_is_added_by_the_formula_of_its_rule(tiny):
    from sret_cli.model.blocks import Block

    x = torch.randn(2, 16, 16)
    for rule, keep, scale in [
        ("plain", 1.0, 1.0),
        ("rezero", 1.0, 0.0),
        ("layerscale", 1.0, 0.1),  # 8 layers
        ("sqrt", 1.0, 8**-0.5),
        ("loop", 1.0, 1 / (2 * 4**0.5)),  # 2 recursions, 4 blocks
    ]:
        block = Block(tiny.with_values(residual=rule), 1).eval()
        y = keep * x + scale * block.attn(block.norm1(x), 1)
        y = keep * y + scale * block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x, 1), y)
    block = Block(tiny.with_values(residual="deepnorm"), 1).eval()
    keep = 24**0.25  # 8 layers of attention, MLP and NLL
    y = block.norm1(keep * x + block.attn(x, 1))
    y = block.norm2(keep * y + block.mlp(y))
    torch.testing.assert_close(block(x, 1), y)


@pytest.mark.parametrize(("layers", "start"), [(16, 0.1), (24, 1e-5), (28, 1e-6)])
def test_layerscale_starts_smaller_the_deeper_the_model(tiny, layers, start):
    block = (
        build_model(tiny.with_values(residual="layerscale").at(layers=layers)).stages[0].blocks[0]
    )
    assert block.scale1.shape == (8,)
    assert block.scale1.tolist() == pytest.approx([start] * 8)


def test_an_explicit_order_of_blocks_is_walked(tiny):
    spec = tiny.with_values(order=((0, 0), (0, 0, 1, 0, 1, 1), (0,)), nll="per_pass")
    assert spec.layers == 9
    model = build_model(spec)
    assert [p.block for p in model.stages[1].schedule] == [0, 0, 1, 0, 1, 1]
    assert [len(stage.nlls) for stage in model.stages] == [2, 6, 1]
    internal = build_model(tiny.with_values(order=((0, 0), (0, 0, 1, 1), (0, 0)))).eval()
    usual = build_model(tiny).eval()
    usual.load_state_dict(internal.state_dict())
    x = image(tiny)
    with torch.no_grad():
        assert torch.equal(internal(x), usual(x))


@pytest.mark.parametrize("loop", ["internal", "external"])
@pytest.mark.parametrize("nll", ["per_pass", "per_block"])
def test_one_model_runs_at_other_recursion_counts(tiny, loop, nll):
    spec = tiny.with_values(recursions=4, loop=loop, nll=nll, shuffle="none")
    model = build_model(spec).eval()
    x = image(spec)
    with torch.no_grad():
        whole = model(x)
        model.set_recursions(1)
        once = model(x)
        model.set_recursions(None)
        assert torch.equal(model(x), whole)
    shallow = build_model(spec.with_values(recursions=1)).eval()
    state = model.state_dict()
    if nll == "per_pass":  # a block's first visit takes the NLL of its first visit
        first = {p.block: p.nll for p in model.stages[1].schedule if p.visit == 0}
        for name in shallow.stages[1].nlls.state_dict():
            block, _, rest = name.partition(".")
            state[f"stages.1.nlls.{name}"] = state[f"stages.1.nlls.{first[int(block)]}.{rest}"]
    shallow.load_state_dict({k: state[k] for k in shallow.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(shallow(x), once)


def test_more_recursions_than_trained_keep_the_first_permutations(tiny):
    model = build_model(tiny).eval()
    before = model.stages[0].permutations_PN.clone()
    with torch.no_grad():
        at_two = model(image(tiny))
        model.set_recursions(5)
        assert model(image(tiny)).isfinite().all()
        rows = model.stages[0].permutations_PN
        assert torch.equal(rows[: len(before)], before)
        assert len(rows) == 4
        model.set_recursions(None)
        assert torch.equal(model(image(tiny)), at_two)


@pytest.mark.parametrize("values", [{"nll": "per_pass"}, {"lrc": "per_pass"}])
def test_more_recursions_than_there_are_weights_per_pass_are_refused(tiny, values):
    model = build_model(tiny.with_values(**values))
    with pytest.raises(SretError, match="3 recursions are more than the 2 .* has weights for"):
        model.set_recursions(3)


@pytest.mark.parametrize("name", PRESETS)
def test_timm_creates_the_presets(name):
    import timm

    model = timm.create_model(name, num_classes=7, drop_path_rate=0.2)
    assert model.spec == PRESETS[name].with_values(num_classes=7, drop_path_rate=0.2)
    assert model.default_cfg["input_size"] == (3, model.spec.img_size, model.spec.img_size)
    assert model.get_classifier().out_features == 7
    assert [info["num_chs"] for info in model.feature_info] == list(model.spec.embed_dims)


def test_features_of_the_stages_follow_timm():
    import timm

    spec = PRESETS["nano"]
    model = timm.create_model("nano").eval()
    x = image(spec)
    features = timm.create_model("nano", features_only=True, out_indices=(0, 2))
    assert [f.shape for f in features(x)] == [(2, 32, 8, 8), (2, 128, 2, 2)]
    assert features.feature_info.reduction() == [2, 8]
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x)
        assert torch.equal(tokens, model.forward_features(x))
        assert torch.equal(maps[2].flatten(2).mT, tokens)
        (second,) = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
        assert torch.equal(second, maps[1])
        first, third = model.forward_intermediates(x, [-1, 0], intermediates_only=True)
        assert torch.equal(third, maps[2]) and torch.equal(first, maps[0])
        assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (0, r"last-n \(0\) is out of range \(1 to 3\)"),
        (5, r"last-n \(5\) is out of range \(1 to 3\)"),
        ([0, 3], r"feature index 3 is out of range \(0 to 2\)"),
        ([-4], r"feature index -1 is out of range \(0 to 2\)"),
    ],
)
def test_stages_that_do_not_exist_are_refused_as_in_timm(tiny, indices, message):
    model = build_model(tiny)
    with pytest.raises(AssertionError, match=message):
        model.forward_intermediates(torch.zeros(1, 3, 16, 16), indices)
    with pytest.raises(AssertionError, match=message):
        model.prune_intermediate_layers(indices)
    assert len(model.stages) == 3


@pytest.mark.parametrize("residual", ["lrc", "layerscale", "rezero", "sqrt", "deepnorm"])
@pytest.mark.parametrize("lrc", ["per_block", "per_pass"])
def test_a_fused_model_gives_the_logits_of_the_model(tiny, residual, lrc):
    torch.manual_seed(0)
    spec = tiny.with_values(recursions=3, residual=residual, lrc=lrc)
    model = build_model(spec)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "lrc" in name or "scale" in name or ".bn" in name and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    fused = model.fused()
    assert not fused.training
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    names = {name for name, _ in fused.named_parameters()}
    assert {n for n in names if "lrc" in n and not n.endswith("lrc_P4")} == set()
    assert not any("scale" in name for name in names)
    x = image(spec)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model.eval()(x), atol=1e-5, rtol=1e-4)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recomputation_draws_the_same_random_numbers_on_cuda(tiny):
    spec = tiny.with_values(recursions=4, drop_path_rate=0.3, drop_rate=0.1)
    results = []
    for segments in ((0, 0, 0), (2, 3, 1)):
        torch.manual_seed(0)
        model = build_model(spec).cuda()
        model.set_recompute(segments)
        loss = model(image(spec).cuda()).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again)
