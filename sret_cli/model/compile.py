"""Compilation of passes, once for each signature, so that its time does not grow with depth.

Regional compilation: `stage.one_pass` is compiled, with the weights as inputs, so that passes of
equal shapes and slices use the same code. A timm model is compiled as one function.

torch's exceptions of the compiler are not public; this is the only file that names them.
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

MAX_SIGNATURES = 64  # of one stage: slices, gathers, training or not, batch sizes

OnFailure = Callable[[str], None]


class Compiled:
    """A function that is compiled at its first call with each kind of arguments.

    If the compiler is missing or fails, `on_failure` gets the reason, and from then on the function
    runs without compilation. If `on_failure` is None, a failure is an error.
    """

    def __init__(self, function: Callable[..., Any], on_failure: OnFailure | None) -> None:
        self.function, self.on_failure = function, on_failure
        self.call = torch.compile(function, dynamic=False, fullgraph=True)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the function.

        Raises:
            SretError: the compiler is missing or fails, and `on_failure` is None.
        """
        try:
            return self.call(*arguments, **named)
        except compiler_errors() as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[0] if lines else type(error).__name__
            if self.on_failure is None:
                raise SretError(
                    f"cannot compile: {reason[:200]}; install a C++ compiler, or use "
                    "--compile auto, which runs without compilation then",
                    RESOURCES,
                ) from error
            self.on_failure(reason)
            self.call = self.function
            return self.function(*arguments, **named)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What torch raises where it cannot compile, or where the C++ compiler is missing or fails."""
    return torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.CppCompileError


def compile_model(
    model: Any, mode: str = "on", on_failure: OnFailure | None = None, stem: bool = True
) -> None:
    """Compiles a model's passes and stem, each when it is next called.

    Args:
        model: a model of either kind. It then runs compiled code in training and in evaluation.
        mode: "off" does not compile; with "on" a missing or failing compiler is an error, with
            "auto" the model then runs without compilation.
        on_failure: with "auto", is called once with the reason of the first failure.
        stem: False does not compile the stem, whose BatchNorm calls other processes in distributed
            training.

    Raises:
        SretError: the mode is unknown.
    """
    check_compile_mode(mode)
    if mode == "off":
        return
    torch.compiler.config.recompile_limit = MAX_SIGNATURES
    failures: list[str] = []

    def report_once(reason: str) -> None:
        if not failures and on_failure is not None:
            on_failure(reason)
        failures.append(reason)

    fall_back = report_once if mode == "auto" else None
    stages = sret_stages(model)
    if not stages:  # a timm model is compiled as one function
        device = next(model.parameters()).device
        Compiled(_copy(_probe), fall_back)(torch.ones(2, device=device))
        if not failures:
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
    """A copy of a function with its own code object, by which torch finds compiled code."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class GraphedInference:
    """Inference on CUDA as one graph of kernels, for batches of one shape.

    A very deep model has thousands of small kernels, and the CPU takes longer to start one than the
    GPU to run it. A graph starts all of them with one call.
    """

    def __init__(self, model: nn.Module, x_BCYX: Tensor, precision: str = "fp32") -> None:
        self.x_BCYX = x_BCYX.clone()
        # No cache of casts: a graph cannot read what was cached outside of it.
        autocast = torch.autocast(
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
