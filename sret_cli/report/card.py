"""The model card of an exported model: what the file is, how to use it, where it comes from."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from sret_cli.cost.trace import profile
from sret_cli.model.kinds import count_layers
from sret_cli.model.sret import parameter_count
from sret_cli.report.columns import COLUMNS, FLOPS_NOTE
from sret_cli.runtime.errors import SretError
from sret_cli.study.axes import format_value
from sret_cli.weights.export import Export
from sret_cli.weights.origin import Origin

RESULTS = ("top1_percent", "top5_percent", "test_loss", "test_images")


def model_card(model: Any, to: str, export: Export, origin: Origin) -> str:
    """The model card of an exported file, in Markdown.

    Args:
        model: the model in the file.
        to: the file's format.
        export: the file, its size, and how far its logits are from the model's.
        origin: the run or file that the model comes from.
    """
    spec, row = model.spec, origin.row
    text = (files("sret_cli.report") / "templates" / "model_card.md").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(
        title=" ".join(origin.name.split()),
        to=to,
        file=export.file.name,
        file_bytes=export.file_bytes,
        difference=export.logits_difference,
        spec=spec,
        fields={field: format_value(value) for field, value in spec.model_dump().items()},
        costs=_costs(model),
        flops_note=FLOPS_NOTE,
        origin=origin,
        classes=None if origin.classes is None else json.dumps(origin.classes, ensure_ascii=False),
        row=row,
        results={
            COLUMNS[column].heading: COLUMNS[column].text(row[column])
            for column in RESULTS
            if row.get(column) is not None
        },
    )


def _costs(model: Any) -> dict[str, str]:
    """Layers, parameters and FLOPs of a model as texts by heading; unknown ones are left out."""
    values = {
        "layers": count_layers(model),
        "params": parameter_count(model),
        "macs": _macs(model.spec),
    }
    return {
        COLUMNS[key].heading: COLUMNS[key].text(value)
        for key, value in values.items()
        if value is not None
    }


def _macs(spec: Any) -> int | None:
    """Multiply-adds for one image; None if a timm model has an operator without a counting rule."""
    try:
        return profile(spec).macs
    except SretError:
        return None
