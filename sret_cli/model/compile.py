"""Compilation of passes, each signature once: the time it takes does not grow with depth.

Regional compilation: what is compiled is `model.one_pass`, whose weights are inputs, so that passes
of equal shapes and slices share their code. Models of timm's are compiled whole.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sret_cli.model.kinds import sret_stages
from sret_cli.model.stage import one_pass
from sret_cli.runtime.errors import RESOURCES, SretError
from sret_cli.spec.train import check_compile_mode

SIGNATURES_AT_MOST = 64  # of one stage: slices, gathers, training or not, batch sizes

OnFailure = Callable[[str], None]


class Compiled:
    """A function that is compiled where it is first called, for each kind of arguments.

    Where the compiler is missing or fails, `on_failure` is told the reason and the function runs as
    it is from then on; without `on_failure` that is an error.
    """

    def __init__(self, function: Callable[..., Any], on_failure: OnFailure | None) -> None:
        self.function, self.on_failure = function, on_failure
        self.call = torch.compile(function, dynamic=False, fullgraph=True)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the function.

        Raises:
            SretError: the compiler is missing or fails, and nothing else was asked for.
        """
        try:
            return self.call(*arguments, **named)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.CppCompileError) as e:
            lines = [line for line in str(e).splitlines() if line.strip()]
            reason = lines[0] if lines else type(e).__name__
            if self.on_failure is None:
                raise SretError(
                    f"cannot compile: {reason[:200]}; install a C++ compiler, or use "
                    "--compile auto, which goes on without",
                    RESOURCES,
                ) from e
            self.on_failure(reason)
            self.call = self.function
            return self.function(*arguments, **named)


def compile_model(
    model: Any, mode: str = "on", on_failure: OnFailure | None = None, stem: bool = True
) -> None:
    """Compiles a model's passes and stem from their next call on.

    Args:
        model: any; in training and in evaluation it then runs compiled code.
        mode: "off" leaves it as it is, "on" makes a missing or failing compiler an error, "auto"
            goes on without.
        on_failure: is told of that, once.
        stem: False leaves the stem as it is, where its BatchNorm asks other processes.

    Raises:
        SretError: there is no such mode.
    """
    check_compile_mode(mode)
    if mode == "off":
        return
    torch._dynamo.config.recompile_limit = SIGNATURES_AT_MOST
    told: list[str] = []

    def tell(reason: str) -> None:
        if not told and on_failure is not None:
            on_failure(reason)
        told.append(reason)

    fall_back = tell if mode == "auto" else None
    stages = sret_stages(model)
    if not stages:  # a timm model is compiled as one function
        device = next(model.parameters()).device
        Compiled(_copy(_probe), fall_back)(torch.ones(2, device=device))
        if not told:
            model.compile(dynamic=False)
        return
    if stem:
        model.call_stem = Compiled(_copy(model.call_stem), fall_back)
    for stage in stages:
        stage.one_pass = Compiled(_copy(one_pass), fall_back)


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_model` has compiled the passes of that SReT; False for timm models."""
    return any(isinstance(stage.one_pass, Compiled) for stage in sret_stages(model))


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with code of its own, since compiled code is found by the code it stands for."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class GraphedInference:
    """Inference on CUDA as one graph of kernels, for batches of one shape.

    Thousands of small kernels then start without the processor's help, which at great depth takes
    longer than they do.
    """

    def __init__(self, model: nn.Module, x_BCYX: Tensor, precision: str = "fp32") -> None:
        self.x_BCYX = x_BCYX.clone()
        autocast = torch.autocast(  # a cache of casts would be filled in one graph and read in none
            "cuda", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.inference_mode(), autocast:
            for _ in range(3):
                model(self.x_BCYX)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), autocast, torch.cuda.graph(self.graph):
            self.logits = model(self.x_BCYX)

    def __call__(self, x_BCYX: Tensor) -> Tensor:
        """Logits of a batch, which the next call overwrites."""
        self.x_BCYX.copy_(x_BCYX)
        self.graph.replay()
        return self.logits
