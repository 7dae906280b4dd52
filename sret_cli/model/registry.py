"""Adds the presets to timm's registry: `import sret_cli.model; timm.create_model("sret_t")`.

timm takes seconds to import, and an SReT does not need it. So the presets are registered when the
user's code imports timm.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sret_cli.spec.presets import PRESETS


def register_models(build: Callable[..., Any]) -> None:
    """Registers every preset with timm: now if timm is imported already, else at its import.

    Args:
        build: makes a model from a `ModelSpec`.
    """
    if "timm" in sys.modules:
        _register(build)
    else:
        sys.meta_path.insert(0, _WhenTimmIsImported(build))


class _WhenTimmIsImported(MetaPathFinder):
    """An import hook that registers the presets right after timm has been imported."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(self.build)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(build: Callable[..., Any]) -> None:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

    def config(name: str) -> dict[str, Any]:
        spec = PRESETS[name]
        return {
            "url": "",
            "num_classes": spec.num_classes,
            "input_size": (spec.in_chans, spec.img_size, spec.img_size),
            "pool_size": (spec.sides[-1], spec.sides[-1]),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.conv1",
            "classifier": "head",
            "license": "mit",
            "paper_ids": "arXiv:2111.05297",
            "paper_name": "Sliced Recursive Transformer",
        }

    def entry(name: str) -> Callable[..., Any]:
        def from_fields(**fields: Any) -> Any:
            if isinstance(fields.get("img_size"), tuple):  # timm passes (height, width)
                fields["img_size"] = fields["img_size"][0]
            return build(PRESETS[name].with_values(**fields))

        def create(pretrained: bool = False, **kwargs: Any) -> Any:
            return build_model_with_cfg(
                from_fields,
                name,
                pretrained,
                feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
                **kwargs,
            )

        create.__name__ = create.__qualname__ = name
        create.__doc__ = (
            f"Builds the preset `{name}`; takes every field of its spec as an argument."
        )
        create.__module__ = __name__
        return create

    globals()["default_cfgs"] = generate_default_cfgs({name: config(name) for name in PRESETS})
    for name in PRESETS:
        register_model(entry(name))
