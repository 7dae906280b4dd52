"""Models for other programs: safetensors, torch.export and ONNX files, each with a model card.

In an exported program a stage loops over passes that are alike: torch's `scan`, which is `Scan` in
ONNX. The shared weights and each block's operations then stand once in the file, whatever the
depth, and a thousand layers are exported in the time of twenty. Unrolled, the graph of 1,000
layers alone would take as much room as the weights. The loop goes over the permutations that
evaluation uses, which are constants of the program.

Tensors carry their shape in their name, as in `model.py`: B batch, N tokens, C channels, Y and X
rows and columns; and K passes of a cycle, S shuffled ones of these.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.fx import GraphModule

from sret_cli.errors import CHECKPOINT, USAGE, SretError, nearest
from sret_cli.model import SReT, build_model
from sret_cli.records import Row, cannot_write, make_directory, write_atomically
from sret_cli.stage import Stage
from sret_cli.weights import CONFIG_FILE, WEIGHTS_FILE, load_model, save_model

FILES = {"safetensors": WEIGHTS_FILE, "torch-export": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CARD_FILE = "README.md"
TOLERANCE = 1e-4  # between the logits of the program and of the model
MAX_PERIOD = 64  # of cycles that are looked for in a schedule


class Cycle(NamedTuple):
    """Passes of a schedule from `start` on: `period` of them, in all `repeats` times."""

    start: int
    period: int
    repeats: int


def find_cycles(kinds: Sequence[Any]) -> list[Cycle]:
    """A schedule as cycles; at each place the one that covers most, the shortest among equals."""
    cycles, start = [], 0
    while start < len(kinds):
        best = Cycle(start, 1, 1)
        for period in range(1, min(MAX_PERIOD, (len(kinds) - start) // 2) + 1):
            end, first = start + period, kinds[start : start + period]
            while kinds[end : end + period] == first:
                end += period
            repeats = (end - start) // period
            if repeats > 1 and repeats * period > best.repeats * best.period:
                best = Cycle(start, period, repeats)
        cycles.append(best)
        start += best.period * best.repeats
    return cycles


class LoopedStage(Stage):
    """A stage whose passes, where they repeat, are one loop of the exported program."""

    def forward(
        self,
        x_BNC: Tensor,
        passes: Sequence[int] | None = None,
        gathers_SN: Tensor | None = None,
        lrcs_K4: Tensor | None = None,
    ) -> Tensor:
        """Walks the schedule; or some passes of it, with the gathers and LRCs of these."""
        if passes is not None:
            orders = iter(() if gathers_SN is None else gathers_SN.unbind())
            lrcs = [None] * len(passes) if lrcs_K4 is None else lrcs_K4.unbind()
            for index, lrc_4 in zip(passes, lrcs, strict=True):
                order_N = next(orders) if self.schedule[index].gathers else None
                x_BNC = self.run_pass(x_BNC, index, order_N, lrc_4=lrc_4)
            return x_BNC
        kinds = [(p.block, p.nll, p.slices, p.gathers) for p in self.schedule]
        for cycle in find_cycles(kinds):
            x_BNC = self._loop(x_BNC, cycle)
        return x_BNC.index_select(1, self.gathers_RN[-1]) if self.ends_shuffled else x_BNC

    def _loop(self, x_BNC: Tensor, cycle: Cycle) -> Tensor:
        start, period, repeats = cycle
        passes = range(start, start + period)
        before = sum(p.gathers for p in self.schedule[:start])
        gathers = sum(self.schedule[index].gathers for index in passes)
        own = {}  # what each round has of its own
        if gathers:
            rows_RN = self.gathers_RN[before : before + repeats * gathers]
            own["gathers_SN"] = rows_RN.unflatten(0, (repeats, gathers))
        if self.lrc_P4 is not None:
            rows_P4 = self.lrc_P4[start : start + repeats * period]
            own["lrcs_K4"] = rows_P4.unflatten(0, (repeats, period))
        if repeats == 1:
            return self(x_BNC, passes, **{name: tensor[0] for name, tensor in own.items()})
        weights = dict(self.named_parameters())
        rounds = list(own.values()) or [torch.zeros(repeats, 1)]  # a loop goes over something

        def body(x_BNC: Tensor, *tensors: Tensor) -> list[Tensor]:
            given = dict(zip(own, tensors[: len(own)], strict=True))
            shared = dict(zip(weights, tensors[len(rounds) :], strict=True))
            return [functional_call(self, shared, (x_BNC, passes), given)]

        # The public `scan` calls dynamo, which takes the unpacked coefficients of a block, views
        # of one parameter, for aliases and gives up; this is the operator that it would make.
        scan = torch.ops.higher_order.scan
        (x_BNC,) = scan(body, [x_BNC], rounds, tuple(weights.values()))
        return x_BNC


def to_program(model: SReT) -> ExportedProgram:
    """The model's evaluation as a program of torch.export, for batches of any size."""
    spec = model.spec
    looped = build_model(spec)
    looped.stages = nn.ModuleList(LoopedStage(spec, stage) for stage in range(spec.stages))
    looped.load_state_dict(model.state_dict())
    for stage in looped.every_stage():  # evaluation takes the gathers that follow from them
        del stage.permutations_PN
    images = torch.zeros(2, spec.in_chans, spec.img_size, spec.img_size)
    looped.eval().requires_grad_(False)
    batch = Dim("batch", min=1)
    program = torch.export.export(looped, (images,), dynamic_shapes=({0: batch},), strict=False)
    for graph in (m for m in program.graph_module.modules() if isinstance(m, GraphModule)):
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # the paths of this machine
    return program


def write_torch_export(model: SReT, path: Path) -> None:
    """Writes the program in torch.export's format."""
    torch.export.save(to_program(model), path)


def write_onnx(model: SReT, path: Path) -> None:
    """Writes the program in ONNX; input `images`, output `logits`."""
    from onnx_ir.passes.common import DeduplicateInitializersPass

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it notes that a loop stacks no outputs
    program = torch.onnx.export(
        to_program(model),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    # The optimizer transposes small weights once for each loop that uses them.
    DeduplicateInitializersPass(size_limit=2**62)(program.model)
    program.save(path)


def run_file(to: str, path: Path, images: Tensor) -> Tensor:
    """Logits of a batch of images, by the file and whatever reads its format."""
    if to == "safetensors":
        return load_model(path.parent).eval()(images)
    if to == "torch-export":
        return torch.export.load(path).module()(images)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@dataclass(frozen=True)
class Export:
    """What was written: the file, its size, and how far its logits are from the model's."""

    file: Path
    file_bytes: int
    logits_difference: float
    export_seconds: float

    def __str__(self) -> str:
        """One line of it all."""
        return (
            f"{self.file}: {self.file_bytes / 1e6:.1f} MB in {self.export_seconds:.1f} s; its "
            f"logits are within {self.logits_difference:.1g} of the model's"
        )


def check_export(to: str, directory: Path) -> None:
    """Refuses an export that can't be before anything is done.

    Raises:
        SretError: the format is unknown, its packages are not installed, or the directory is there.
    """
    if to not in FILES:
        raise SretError(f"unknown format {to!r}; {nearest(to, list(FILES))}", USAGE)
    missing = [name for name in ONNX_PACKAGES if to == "onnx" and find_spec(name) is None]
    if missing:
        raise SretError(
            f"--to onnx needs {', '.join(missing)}; install it with pip install 'sret[onnx]'", USAGE
        )
    if directory.exists():
        raise SretError(f"{directory} is there already; choose another directory", USAGE)
    if directory.suffix in {Path(name).suffix for name in FILES.values()}:
        raise SretError(
            f"--out {directory} looks like a file; name the directory that gets {FILES[to]} and "
            f"{CARD_FILE}",
            USAGE,
        )


def export_model(
    model: SReT, to: str, directory: Path, name: str = "model", row: Row | None = None
) -> Export:
    """Writes a model in another format, checks it, and describes it in a model card.

    The directory appears when all is well, and not at all otherwise. `row` is what the model's run
    measured.

    Raises:
        SretError: as `check_export`; or the directory cannot be written to, or the logits of the
            file and of the model on a random image differ by more than 1e-4.
    """
    check_export(to, directory)
    start = time.perf_counter()
    make_directory(directory.parent)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    write: dict[str, Callable[[SReT, Path], None]] = {
        "safetensors": lambda model, path: save_model(model, path.parent),
        "torch-export": write_torch_export,
        "onnx": write_onnx,
    }
    try:
        path = make_directory(temporary) / FILES[to]
        write[to](model.eval(), path)
        seconds = time.perf_counter() - start
        difference = logits_difference(model, to, path)
        # ONNX keeps weights of more than 2 GB in a file beside the program.
        size = sum(f.stat().st_size for f in temporary.iterdir() if f.name != CONFIG_FILE)
        export = Export(directory / FILES[to], size, difference, seconds)
        write_atomically(temporary / CARD_FILE, model_card(model, to, export, name, row))
        os.replace(temporary, directory)
    except OSError as error:
        raise cannot_write(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return export


def logits_difference(model: SReT, to: str, path: Path) -> float:
    """The largest difference between the logits of a file and of its model on a random image.

    Raises:
        SretError: it is more than 1e-4, or the model's logits are not finite.
    """
    spec, generator = model.spec, torch.Generator().manual_seed(0)
    image = torch.randn(1, spec.in_chans, spec.img_size, spec.img_size, generator=generator)
    with torch.no_grad():
        expected = model(image)
    if not expected.isfinite().all():
        raise SretError(
            "the model's logits are not finite; train it again, or choose another", CHECKPOINT
        )
    with torch.no_grad():
        found = run_file(to, path, image)
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:
        raise SretError(
            f"the logits of the {to} program differ from the model's by {difference:.2g}, more "
            f"than {TOLERANCE:g}; nothing was written; use another format",
            CHECKPOINT,
        )
    return difference


def model_card(model: SReT, to: str, export: Export, name: str, row: Row | None) -> str:
    """What the file is, in Markdown."""
    from sret_cli.profiler import trace
    from sret_cli.views import COLUMNS, FLOPS_NOTE, show

    spec, row = model.spec, row if row and row["final_loss"] is not None else {}
    params, macs = sum(p.numel() for p in model.parameters()), trace(spec).macs
    shown = ("top1_percent", "top5_percent", "test_loss", "test_images")
    template = (files("sret_cli") / "templates" / "model_card.md").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=name,
        to=to,
        export=export,
        spec=spec,
        fields={field: show(value) for field, value in spec.model_dump().items()},
        layers=COLUMNS["layers"].text(spec.layers),
        params=COLUMNS["params"].text(params),
        macs=COLUMNS["macs"].text(macs),
        flops_note=FLOPS_NOTE,
        row=row,
        normalised=_normalised(row),
        results={
            COLUMNS[column].heading: COLUMNS[column].text(row[column])
            for column in shown
            if row.get(column) is not None
        },
    )


def _normalised(row: Row) -> str:
    if not row:
        return "as the data that the model is trained on"
    if row["train.dataset"] != "digits":
        return "by ImageNet's mean and deviation"
    from sret_cli.augment import DIGITS_MEAN, DIGITS_STD

    return f"by mean {DIGITS_MEAN} and deviation {DIGITS_STD}"
