"""The published table: what the authors print of each variant, as data (`published.csv`).

Source: the README of github.com/szq0214/SReT, whose names `source` gives (an asterisk: unsliced),
and "Sliced Recursive Transformer", ECCV 2022, arXiv 2111.05297. Distilled models have the same
architecture as plain ones.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from sret_cli.spec.backbone import Spec
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.run import Row


@dataclass(frozen=True)
class Published:
    """One line of the table: multiply-adds (G), parameters (M) and top-1 (%), as printed."""

    preset: str
    distilled: bool
    gmacs: float
    params_m: float
    top1_percent: float
    source: str


@cache
def published_table() -> tuple[Published, ...]:
    """All lines, in the authors' order."""
    lines = csv.DictReader(
        (files("sret_cli.cost") / "published.csv").read_text("utf-8").splitlines()
    )
    return tuple(
        Published(
            line["preset"],
            line["distilled"] == "yes",
            float(line["gmacs"]),
            float(line["params_m"]),
            float(line["top1_percent"]),
            line["source"],
        )
        for line in lines
    )


def published_columns(spec: Spec, params: int, macs: int) -> Row:
    """What the table says of a spec, beside what was counted; nothing where it is not in it.

    The differences are ours, rounded to the one decimal that is printed, minus the printed ones.
    """
    lines = [line for line in published_table() if PRESETS[line.preset] == spec]
    if not lines:
        return {}
    top1 = {line.distilled: line.top1_percent for line in lines}
    return {
        "published_params_m": lines[0].params_m,
        "params_m_minus_published": round(round(params / 1e6, 1) - lines[0].params_m, 1) + 0.0,
        "published_gmacs": lines[0].gmacs,
        "gmacs_minus_published": round(round(macs / 1e9, 1) - lines[0].gmacs, 1) + 0.0,
        "published_top1_percent": top1.get(False),
        "published_distilled_top1_percent": top1.get(True),
    }
