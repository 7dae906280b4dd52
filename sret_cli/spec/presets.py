"""The named models: the published variants, `deep` and `nano`.

Examples:
    >>> from sret_cli import PRESETS
    >>> PRESETS["sret_t"].layers
    20
    >>> PRESETS["deep"].at(layers=1000).recursions
    (100, 100, 100)
"""

from sret_cli.runtime.errors import SretError, nearest_choice
from sret_cli.spec.model import ModelSpec

_SRET_T = ModelSpec(
    embed_dims=(64, 128, 256),
    num_heads=(2, 4, 8),
    blocks=(2, 5, 3),
    recursions=(2, 2, 2),
    slices=(8, 4, 1),
    recursive_slices=(2, 1, 1),
    mlp_ratio=3.6,
    nll="per_pass",
    nll_ratio=1,
)

PRESETS: dict[str, ModelSpec] = {
    "sret_t": _SRET_T,
    "sret_lt": _SRET_T.with_values(mlp_ratio=4.0),
    "sret_s": _SRET_T.with_values(
        embed_dims=(126, 252, 504), num_heads=(3, 6, 12), mlp_ratio=3.0, nll_ratio=2
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
"""The presets by name."""

BASE_PRESETS = tuple(PRESETS)

# The other published variants; `published.csv` has their figures.
for _name in ("sret_t", "sret_lt", "sret_s"):
    PRESETS[f"{_name}_unsliced"] = PRESETS[_name].with_values(slices=1, recursive_slices=1)
PRESETS["sret_lt_16_14"] = PRESETS["sret_lt"].with_values(slices=(16, 14, 1), recursive_slices=1)
for _name, _size in (("sret_t", 384), ("sret_s", 384), ("sret_s", 512)):
    PRESETS[f"{_name}_{_size}"] = PRESETS[f"{_name}_unsliced"].with_values(img_size=_size)


def preset(name: str) -> ModelSpec:
    """The preset of that name.

    Raises:
        SretError: there is no such preset; the message names the nearest.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise SretError(f"unknown preset {name!r}; {nearest_choice(str(name), list(PRESETS))}")
    return PRESETS[name]
