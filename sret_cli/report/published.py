"""Published models, to stand behind one's own: ImageNet-1k, without extra data or distillation."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

PUBLISHED_NOTE = "Grey: published models, ImageNet-1k at 224 px"


@dataclass(frozen=True)
class PublishedModel:
    """One line of `published.csv`: parameters (M), multiply-adds (G) and top-1 (%) as printed."""

    model: str
    family: str
    params_m: float
    gmacs: float
    top1_percent: float
    resolution: int
    source: str

    def value(self, column: str) -> float | None:
        """The number of a column in the unit of figures, or None."""
        known = {"params": self.params_m, "macs": self.gmacs, "top1_percent": self.top1_percent}
        return known.get(column)


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """All lines, family by family, from small to large."""
    text = (files("sret_cli.report") / "published.csv").read_text("utf-8")
    return tuple(
        PublishedModel(
            model=line["model"],
            family=line["family"],
            params_m=float(line["params_m"]),
            gmacs=float(line["gmacs"]),
            top1_percent=float(line["top1_percent"]),
            resolution=int(line["resolution"]),
            source=line["source"],
        )
        for line in csv.DictReader(text.splitlines())
    )
