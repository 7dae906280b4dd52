"""The two kinds of models, an SReT and a recursive timm model, and what differs between them.

Other folders ask these functions, and for a spec `spec.is_timm`. They do not look at a model's
class. A model of either kind has its spec as `model.spec`.
"""

from copy import deepcopy
from typing import Any

from sret_cli.model.backbone import block_sequences, build_backbone
from sret_cli.model.sret import SReT, build_model, parameter_count
from sret_cli.model.stage import Stage
from sret_cli.runtime.errors import SretError
from sret_cli.spec.backbone import Spec


def build_any(spec: Spec) -> Any:
    """A freshly initialised model of either kind of spec, in training mode."""
    return build_backbone(spec) if spec.is_timm else build_model(spec)


def sret_stages(model: Any) -> list[Stage]:
    """The stages of an SReT, from first to last; none of a timm model."""
    return model.every_stage() if isinstance(model, SReT) else []


def count_layers(model: Any) -> int | None:
    """Passes of all stages, as the model runs now; None for a timm model without `Passes`."""
    passes = [len(stage.schedule) for stage in sret_stages(model)]
    passes += [passes.layers for passes in block_sequences(model).values()]
    return sum(passes) or None


def set_recursions(model: Any, recursions: int | None, where: str = "this run") -> None:
    """Sets how often later calls run each block of an SReT (`SReT.set_recursions`).

    Args:
        model: a model of either kind.
        recursions: of each block; None is the number of the model's spec.
        where: what holds the model, for the error message.

    Raises:
        SretError: a timm model, or an SReT without weights for that number of recursions.
    """
    if not isinstance(model, SReT):
        raise SretError(f"{where} holds a timm model; its recursions cannot be changed")
    model.set_recursions(recursions)


def inference_copy(model: Any) -> Any:
    """A copy for inference, in eval mode: of an SReT the fused one."""
    return model.fused() if isinstance(model, SReT) else deepcopy(model).eval()


def describe_stages(model: Any) -> list[dict[str, Any]]:
    """The sizes, sets of block weights (`blocks`) and `params` of each stage, as plain values.

    The stages of a timm model are its sequences of blocks, by their names.
    """
    spec: Spec = model.spec
    if spec.is_timm:
        return [
            {
                "name": name,
                "blocks": passes.banks,
                "layers": passes.layers,
                "params": parameter_count(passes),
            }
            for name, passes in block_sequences(model).items()
        ]
    return [
        {
            "tokens": spec.tokens[s],
            "embed_dims": spec.embed_dims[s],
            "blocks": spec.blocks[s],
            "recursions": spec.recursions[s],
            "slices": spec.slices[s],
            "recursive_slices": spec.recursive_slices[s],
            "params": parameter_count(stage),
        }
        for s, stage in enumerate(sret_stages(model))
    ]
