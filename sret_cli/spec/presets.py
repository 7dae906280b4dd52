"""The named models: the published variants, `deep` and `nano`."""

from typing import Any

from sret_cli.runtime.errors import SretError, nearest_choice
from sret_cli.spec.model import ModelSpec

_TINY: dict[str, Any] = {
    "embed_dims": (64, 128, 256),
    "num_heads": (2, 4, 8),
    "blocks": (2, 5, 3),
    "recursions": 2,
    "slices": (8, 4, 1),
    "recursive_slices": (2, 1, 1),
    "nll": "per_pass",
    "nll_ratio": 1,
}


PRESETS: dict[str, ModelSpec] = {
    "sret_t": ModelSpec(**_TINY, mlp_ratio=3.6),
    "sret_lt": ModelSpec(**_TINY, mlp_ratio=4.0),
    "sret_s": ModelSpec(
        **{**_TINY, "embed_dims": (126, 252, 504), "num_heads": (3, 6, 12), "nll_ratio": 2},
        mlp_ratio=3.0,
    ),
    "deep": ModelSpec(),
    "nano": ModelSpec(
        img_size=16,
        num_classes=10,
        stem_strides=(1, 2, 1),
        embed_dims=(32, 64, 128),
        num_heads=(1, 2, 4),
        blocks=(1, 2, 1),
        slices=(1, 1, 1),
        recursive_slices=(1, 1, 1),
    ),
}


BASE_PRESETS = tuple(PRESETS)


# The other published variants: `published.csv` has their figures.
_UNSLICED: dict[str, Any] = {"slices": 1, "recursive_slices": 1}


PRESETS |= {f"{name}_unsliced": PRESETS[name].with_values(**_UNSLICED) for name in BASE_PRESETS[:3]}


PRESETS["sret_lt_16_14"] = PRESETS["sret_lt"].with_values(slices=(16, 14, 1), recursive_slices=1)


for _name, _size in (("sret_t", 384), ("sret_s", 384), ("sret_s", 512)):
    PRESETS[f"{_name}_{_size}"] = PRESETS[_name].with_values(**_UNSLICED, img_size=_size)


def preset(name: str) -> ModelSpec:
    """The preset of that name.

    Raises:
        SretError: there is none; the message names the nearest.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise SretError(f"unknown preset {name!r}; {nearest_choice(str(name), list(PRESETS))}")
    return PRESETS[name]
