"""The model card of an exported model: what the file is, how to use it, where it comes from."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from sret_cli.report.columns import COLUMNS, FLOPS_NOTE
from sret_cli.spec.backbone import Spec
from sret_cli.study.axes import format_value

if TYPE_CHECKING:
    from sret_cli.weights.export import Export
    from sret_cli.weights.origin import Origin

RESULTS = ("top1_percent", "top5_percent", "test_loss", "test_images")


def model_card(
    spec: Spec, costs: Mapping[str, int | None], to: str, export: "Export", origin: "Origin"
) -> str:
    """The model card of an exported file, in Markdown.

    Args:
        spec: spec of the model in the file.
        costs: `layers`, `params` and `macs` of the model; None for what is not known.
        to: the file's format.
        export: the file, its size, and how far its logits are from the model's.
        origin: the run or file that the model comes from.
    """
    row = origin.row
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
        costs={
            COLUMNS[name].heading: COLUMNS[name].text(value)
            for name, value in costs.items()
            if value is not None
        },
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
