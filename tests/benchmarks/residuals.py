"""How signal and gradient fare at initialisation through many shared passes, by residual rule.

    python tests/benchmarks/residuals.py [--layers 1000] [--nll per_block]

One stage of 10 blocks, 64 wide, 49 tokens; the input is standard normal, and so is the gradient
that comes in from above. For each rule it prints the root mean square of the stage's output, and
the root mean square of the gradient at the stage's input, both over that at the other end: 1 is a
signal that neither grows nor fades. The last column is the norm of the blocks' gradients, over
that at 10 layers: rules far from 1 need another learning rate at another depth.
"""

import argparse
from dataclasses import dataclass

import torch

from sret_cli.model.sret import build_model
from sret_cli.model.stage import Stage
from sret_cli.spec.model import ModelSpec

RULES = ("lrc", "plain", "layerscale", "rezero", "sqrt", "loop", "deepnorm")


@dataclass(frozen=True)
class Norms:
    """Root mean squares at the end of a stage over those at its start, and a gradient norm."""

    forward: float
    backward: float
    parameters: float


def spec_of(rule: str, layers: int, nll: str) -> ModelSpec:
    """A model of one stage of 10 blocks with that many layers."""
    return ModelSpec(
        img_size=56,
        embed_dims=(64,),
        num_heads=2,
        blocks=10,
        recursions=layers // 10,
        slices=1,
        recursive_slices=1,
        num_classes=10,
        residual=rule,
        nll=nll,
    )


def probe(rule: str, layers: int, nll: str = "per_block") -> Norms:
    """Sends a random signal forth and a random gradient back through a fresh stage."""
    torch.manual_seed(0)
    stage = build_model(spec_of(rule, layers, nll)).stages[0]
    assert isinstance(stage, Stage)
    x = torch.randn(2, 49, 64, requires_grad=True)
    above = torch.randn(2, 49, 64)
    output = stage(x)
    output.backward(above)
    assert x.grad is not None
    squares = [p.grad.square().sum() for p in stage.parameters() if p.grad is not None]
    return Norms(
        forward=(output.square().mean() / x.square().mean()).sqrt().item(),
        backward=(x.grad.square().mean() / above.square().mean()).sqrt().item(),
        parameters=torch.stack(squares).sum().sqrt().item(),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--nll", default="per_block")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    print("| rule | output rms | input gradient rms | parameter gradient, over 10 layers' |")
    print("| --- | ---: | ---: | ---: |")
    for rule in RULES:
        deep = probe(rule, arguments.layers, arguments.nll)
        shallow = probe(rule, 10, arguments.nll)
        ratio = deep.parameters / shallow.parameters
        print(f"| {rule} | {deep.forward:.3g} | {deep.backward:.3g} | {ratio:.3g} |")


if __name__ == "__main__":
    main()
