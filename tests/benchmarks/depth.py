"""What depth costs, in time, memory and profiling, with ours and with the reference's code.

    python tests/benchmarks/depth.py --reference SReT --out studies/results

At the widths of sret_t, 224 px, batch 1, with an NLL for each pass, as published: the same network
of both. The reference's memory is measured by autograd's hooks, ours predicted (the tests compare
it with the hooks, to the byte), with and without recomputation. Writes `depth-cost.csv`, depth by
depth (what is in it is not measured again), and the figure of the README.
"""

from pathlib import Path

import pandas as pd
import torch
from common import arguments, deep_reference, prepare, reference_module, seconds
from matplotlib import pyplot as plt

from sret_cli.cost.footprint import Setting
from sret_cli.cost.memory import predict_memory
from sret_cli.cost.module_costs import count_module, saved_bytes
from sret_cli.cost.trace import _traced, trace_costs
from sret_cli.model.sret import build_model
from sret_cli.spec.presets import PRESETS

LAYERS = (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
REFERENCE_AT_MOST = 1000  # 10,000 would keep 28 GB, and trace for six minutes
PANELS = {
    "forward_seconds": ("Forward pass (s)", 1),
    "kept_bytes": ("Kept for backward (MB)", 1e6),
    "profile_seconds": ("Profile (s)", 1),
}


def measure_ours(layers: int, rounds: int) -> dict[str, dict[str, float]]:
    """Times and bytes of ours, without and with recomputation."""
    spec = PRESETS["sret_t"].at(layers=layers)
    _traced.clear()
    profile = seconds(lambda: trace_costs(spec))
    model, x = build_model(spec).fused(), torch.randn(1, 3, 224, 224)
    plain, _ = predict_memory(spec, Setting(1, device="cpu"))
    least, _ = predict_memory(spec, Setting(1, device="cpu"), "auto")
    return {
        "sret": {
            "forward_seconds": forward_seconds(model, x, rounds),
            "kept_bytes": plain.saved_bytes,
            "profile_seconds": profile,
        },
        "sret, recompute auto": {"kept_bytes": least.kept_bytes},
    }


def measure_reference(module, layers: int, rounds: int) -> dict[str, float]:
    """Times and bytes of the reference's code."""
    model = deep_reference(module, PRESETS["sret_t"].at(layers=layers))
    x = torch.zeros(1, 3, 224, 224)
    profile = seconds(lambda: count_module(model, x))
    model.train()
    kept = saved_bytes(model, torch.randn(2, 3, 224, 224)) / 2
    model.eval()
    return {
        "forward_seconds": forward_seconds(model, torch.randn(1, 3, 224, 224), rounds),
        "kept_bytes": kept,
        "profile_seconds": profile,
    }


def forward_seconds(model: torch.nn.Module, x: torch.Tensor, rounds: int) -> float:
    """The median over some rounds."""
    with torch.inference_mode():
        model(x)
        return sorted(seconds(lambda: model(x)) for _ in range(rounds))[rounds // 2]


def main() -> None:
    """Measures, prints and draws."""
    parser = arguments(__doc__, reference=True)
    parser.set_defaults(rounds=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    machine = prepare("cpu")
    module = reference_module(given.reference)
    path = given.out / "depth-cost.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    for layers in LAYERS:
        if any(row["layers"] == layers for row in rows):
            continue
        found = measure_ours(layers, given.rounds)
        if layers <= REFERENCE_AT_MOST:
            found["reference"] = measure_reference(module, layers, given.rounds)
        rows += [{"code": c, "layers": layers, **v, "machine": machine} for c, v in found.items()]
        print(pd.DataFrame(rows[-len(found) :]).drop(columns="machine").to_string(index=False))
        pd.DataFrame(rows).to_csv(path, index=False)
    draw(pd.DataFrame(rows), given.out / "depth-cost")


def draw(table: pd.DataFrame, path: Path) -> None:
    """One panel for each measurement, both axes logarithmic."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.4), layout="constrained")
    for axis, (column, (label, unit)) in zip(axes, PANELS.items(), strict=True):
        styles = zip(table["code"].unique(), ("C0o-", "C0^--", "C1s-"), strict=True)
        for code, style in styles:
            shown = table[table["code"] == code].dropna(subset=column)
            if len(shown):
                axis.loglog(shown["layers"], shown[column] / unit, style, label=code)
        axis.set(xlabel="Layers", ylabel=label)
        axis.set_ylim(bottom=0.05 if column == "profile_seconds" else None)
        axis.grid(alpha=0.3)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
