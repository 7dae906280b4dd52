import copy

import pytest
import torch

from sret_cli.model.compile import GraphedInference, compile_model, compiler_errors
from sret_cli.model.sret import build_model
from sret_cli.runtime.errors import RESOURCES, USAGE, SretError
from sret_cli.spec.train import check_compile_mode


def image(spec, batch=2):
    return torch.randn(batch, spec.in_chans, spec.img_size, spec.img_size)


@pytest.fixture
def fresh():
    """Counts graphs from here on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_each_signature_is_compiled_once_whatever_the_depth_and_never_again(tiny, fresh):
    spec = tiny.with_values(blocks=2, recursions=10, drop_path_rate=0.1)
    assert spec.layers == 60
    model = build_model(spec)
    eager = copy.deepcopy(model)
    compile_model(model)
    for step in range(3):
        x = image(spec)
        torch.manual_seed(step)
        output = model(x)
        torch.manual_seed(step)
        expected = eager(x)
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        for some in (output, expected):
            some.square().sum().backward()
        # The stem. In stage 1 the first pass, those that put tokens back in their order, those that
        # shuffle; in stage 2 the last two are alike; in stage 3 all are.
        assert fresh["unique_graphs"] == 1 + 3 + 2 + 1
    for (name, one), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-3, rtol=1e-3, msg=name)
    model.eval(), eager.eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), eager(x), atol=1e-4, rtol=1e-4)
        before = fresh["unique_graphs"]
        model(x)
    assert fresh["unique_graphs"] == before


def test_torch_still_has_the_compiler_errors_that_compile_py_catches():
    import torch._dynamo.exc
    import torch._inductor.exc

    names = [error.__name__ for error in compiler_errors()]
    assert names == ["TorchDynamoException", "CppCompileError"]
    assert issubclass(torch._dynamo.exc.BackendCompilerFailed, compiler_errors())
    assert not issubclass(RuntimeError, compiler_errors())


def test_torch_still_has_the_limit_of_recompilations_that_compile_py_sets(fresh):
    with torch._dynamo.config.patch(recompile_limit=8):
        torch.compiler.config.recompile_limit = 64
        assert torch._dynamo.config.recompile_limit == 64


@pytest.fixture
def no_compiler(fresh):
    with torch._inductor.config.patch(
        {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    ):
        yield


@pytest.mark.slow
def test_without_a_compiler_auto_runs_uncompiled_and_reports_that_once(tiny, no_compiler):
    model, reports = build_model(tiny).eval(), []
    x = image(tiny)
    with torch.no_grad():
        expected = model(x)
        compile_model(model, "auto", reports.append)
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert len(reports) == 1
    assert "C++ compiler" in reports[0]


@pytest.mark.slow
def test_without_a_compiler_on_is_an_error_that_says_what_to_do(tiny, no_compiler):
    model = build_model(tiny)
    compile_model(model)
    with pytest.raises(SretError, match="cannot compile: .*; install .* --compile auto") as error:
        model(image(tiny))
    assert error.value.code == RESOURCES


def test_an_unknown_mode_is_refused(tiny):
    with pytest.raises(SretError, match="unknown mode of compilation 'onn'; did you mean 'on'"):
        compile_model(build_model(tiny), "onn")
    with pytest.raises(SretError) as error:
        check_compile_mode("fast")
    assert error.value.code == USAGE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_gives_the_logits_of_the_model(tiny):
    model = build_model(tiny.with_values(recursions=20)).cuda().eval()
    x = image(tiny).cuda()
    compile_model(model)
    graphed = GraphedInference(model, x)
    for _ in range(2):
        x = torch.randn_like(x)
        with torch.inference_mode():
            expected = model(x)
        torch.testing.assert_close(graphed(x), expected, atol=1e-4, rtol=1e-4)
