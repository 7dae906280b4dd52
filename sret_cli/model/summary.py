"""What a built model consists of, as plain values."""

import time
from typing import Any

import torch

from sret_cli.model.kinds import count_layers, describe_stages
from sret_cli.model.sret import parameter_count


def summarise(model: Any) -> dict[str, Any]:
    """A model's spec, stages, layers and parameters, and how one random image ran through it."""
    spec = model.spec
    x = torch.randn(1, spec.in_chans, spec.img_size, spec.img_size)
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model.eval()(x)
    seconds = time.perf_counter() - start
    stages = describe_stages(model)
    total = parameter_count(model)
    return {
        "model": spec.model_dump(mode="json"),
        "stages": stages,
        "layers": count_layers(model),
        "params": total,
        "params_outside_stages": total - sum(stage["params"] for stage in stages),
        "forward_seconds": seconds,
        "logits_are_finite": bool(logits.isfinite().all()),
    }
