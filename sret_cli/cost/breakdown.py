"""The costs of a model, part by part."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from sret_cli.spec.backbone import Spec

KINDS = ("stem", "projections", "attention products", "mlp", "nll", "norms", "pools", "head")


@dataclass(frozen=True)
class Counts:
    """What one call of a module costs, for one image.

    Attributes:
        params: parameters; shared ones count once.
        macs_by_kind: multiply-adds of each kind of work, or of each operator.
        activations: elements that fvcore counts as activations.
        activation_bytes: bytes that autograd keeps for the backward pass, in fp32.
    """

    params: int
    macs_by_kind: tuple[tuple[str, int], ...]
    activations: int
    activation_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-adds of all kinds."""
        return sum(macs for _, macs in self.macs_by_kind)


@dataclass(frozen=True)
class Part:
    """A module of the network, and how often it runs; `stage` is None outside the stages."""

    stage: int | None
    label: str
    times: int
    counts: Counts


@dataclass(frozen=True)
class Profile:
    """The exact costs of a spec: parts that add up to the whole network.

    For a timm model `params_by_stage` is empty, and `layers` is None where it is not known.
    """

    spec: Spec
    layers: int | None
    params: int
    params_by_stage: tuple[int, ...]
    parts: tuple[Part, ...]

    def _sum(self, name: str) -> int:
        return sum(part.times * getattr(part.counts, name) for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-adds of one image's forward pass."""
        return self._sum("macs")

    @property
    def activations(self) -> int:
        """Elements that fvcore counts as activations, for one image."""
        return self._sum("activations")

    @property
    def activation_bytes(self) -> int:
        """Bytes that autograd keeps of one image for the backward pass, in fp32."""
        return self._sum("activation_bytes")

    def macs_by_kind(self) -> dict[str, int]:
        """Multiply-adds of each kind of work, or for a timm model of each operator."""
        total: Counter[str] = Counter()
        for part in self.parts:
            for kind, macs in part.counts.macs_by_kind:
                total[kind] += part.times * macs
        return {kind: total[kind] for kind in (KINDS if self.params_by_stage else total)}

    def macs_by_stage(self) -> tuple[int, ...]:
        """Multiply-adds of each stage's passes, without stem, pools and head."""
        return tuple(
            sum(p.times * p.counts.macs for p in self.parts if p.stage == stage)
            for stage in range(len(self.params_by_stage))
        )

    def row(self) -> dict[str, Any]:
        """The measurements of a row."""
        return {
            "layers": self.layers,
            "params": self.params,
            "macs": self.macs,
            "activations": self.activations,
            "activation_bytes": self.activation_bytes,
        }
