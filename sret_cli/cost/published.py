"""The published table: what the authors report for each variant (`published.csv`).

Sources: the README of github.com/szq0214/SReT, whose names are in `source` (an asterisk means
unsliced), and "Sliced Recursive Transformer", ECCV 2022, arXiv 2111.05297. Distilled models have
the same architecture as plain ones.
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
            preset=line["preset"],
            distilled=line["distilled"] == "yes",
            gmacs=float(line["gmacs"]),
            params_m=float(line["params_m"]),
            top1_percent=float(line["top1_percent"]),
            source=line["source"],
        )
        for line in lines
    )


def published_columns(spec: Spec, params: int, macs: int) -> Row:
    """The published numbers of a spec and how ours differ; empty if the table does not have it.

    A difference is our number, rounded to the one decimal that is printed, minus the printed one.
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
