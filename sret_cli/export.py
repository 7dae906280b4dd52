"""Models for other programs: safetensors, torch.export and ONNX files, each with a model card.

In an exported SReT a stage loops over passes that are alike: torch's `scan`, which is `Scan` in
ONNX. The shared weights and each block's operations then stand once in the file, whatever the
depth, and a thousand layers are exported in the time of twenty. Unrolled, the graph of 1,000
layers alone would take as much room as the weights. The loop goes over the permutations that
evaluation uses, which are constants of the program. The passes of a backbone are unrolled; its
tied weights stand once in the file, too.

Tensors carry their shape in their name, as in `model.py`: B batch, N tokens, C channels, Y and X
rows and columns; and K passes of a cycle, S shuffled ones of these.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call
from torch.fx import GraphModule

from sret_cli.backbone import BackboneSpec, Spec
from sret_cli.errors import CHECKPOINT, USAGE, SretError, nearest, out_of_memory
from sret_cli.model import SReT, build_model
from sret_cli.model_card import model_card
from sret_cli.origin import Origin
from sret_cli.records import cannot_write, make_directory, write_atomically
from sret_cli.recurse import MISFITS
from sret_cli.stage import Stage
from sret_cli.weights import CONFIG_FILE, WEIGHTS_FILE, load_model, save_model

FILES = {"safetensors": WEIGHTS_FILE, "torch-export": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CARD_FILE = "README.md"
TOLERANCE = 1e-4  # between the logits of the program and of the model
BATCH_SIZES = (1, 3)  # of random images that the logits are compared for
METADATA_FILE = "metadata.json"  # in a program of torch.export
METADATA_KEY = "sret"  # of safetensors, which write several keys in any order
UNKNOWN_ORIGIN = Origin("model")
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


def to_program(model: Any) -> ExportedProgram:
    """The model's evaluation as a program of torch.export, for batches of any size.

    Raises:
        SretError: torch.export cannot take the backbone.
    """
    spec = model.spec
    if isinstance(model, SReT):
        return _exported(_with_loops(model), spec)
    with _refused_backbones(spec, "as a program of torch.export"):
        return _exported(_with_parameters_registered(model), spec)


def _exported(module: nn.Module, spec: Spec) -> ExportedProgram:
    images = torch.zeros(2, spec.in_chans, spec.img_size, spec.img_size)
    module.eval().requires_grad_(False)
    batch = Dim("batch", min=1)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},), strict=False)
    for graph in (m for m in program.graph_module.modules() if isinstance(m, GraphModule)):
        for node in graph.graph.nodes:
            node.meta.pop("stack_trace", None)  # the paths of this machine
    return program


def _with_loops(model: SReT) -> SReT:
    """A copy whose stages are loops."""
    spec = model.spec
    looped = build_model(spec)
    looped.stages = nn.ModuleList(LoopedStage(spec, stage) for stage in range(spec.stages))
    looped.load_state_dict(model.state_dict())
    for stage in looped.every_stage():  # evaluation takes the gathers that follow from them
        del stage.permutations_PN
    return looped


def _with_parameters_registered(model: nn.Module) -> nn.Module:
    """A copy of a backbone whose tied blocks have their parameters registered.

    torch.export needs that; `recurse.Passes` keeps them as plain attributes.
    """
    copy = deepcopy(model)
    for module in copy.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, nn.Parameter):
                delattr(module, name)
                module.register_parameter(name, value)
    return copy


@contextmanager
def _refused_backbones(spec: Spec, what: str) -> Iterator[None]:
    """Makes what exporters raise for a backbone that they cannot take a user's error."""
    try:
        yield
    except MISFITS as error:
        if out_of_memory(error) is not None or not isinstance(spec, BackboneSpec):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SretError(
            f"{spec.backbone} cannot be written {what}: {reason}; use --to safetensors"
        ) from None


def write_safetensors(model: Any, path: Path, origin: Origin = UNKNOWN_ORIGIN) -> None:
    """Writes `config.json` and the weights, whose metadata are JSON under the key "sret"."""
    metadata = json.dumps(origin.metadata(model.spec), ensure_ascii=False)
    save_model(model, path.parent, origin.config(), {METADATA_KEY: metadata})


def write_torch_export(model: Any, path: Path, origin: Origin = UNKNOWN_ORIGIN) -> None:
    """Writes the program in torch.export's format, with a file `metadata.json` in it."""
    metadata = json.dumps(origin.metadata(model.spec), indent=2, ensure_ascii=False)
    torch.export.save(to_program(model), path, extra_files={METADATA_FILE: metadata})


def write_onnx(model: Any, path: Path, origin: Origin = UNKNOWN_ORIGIN) -> None:
    """Writes the program in ONNX, with metadata; input `images`, output `logits`."""
    from onnx_ir.passes.common import DeduplicateInitializersPass

    for name in ("onnx_ir", "onnxscript"):  # they note that loops and splits are left as they are
        logging.getLogger(name).setLevel(logging.ERROR)
    exported = to_program(model)
    with _refused_backbones(model.spec, "in ONNX"):
        program = torch.onnx.export(
            exported,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # The optimizer transposes small weights once for each loop that uses them.
    DeduplicateInitializersPass(size_limit=2**62)(program.model)
    program.model.metadata_props.update(origin.metadata(model.spec))
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


def export_model(model: Any, to: str, directory: Path, origin: Origin = UNKNOWN_ORIGIN) -> Export:
    """Writes a model in another format, checks it, and describes it in a model card.

    The directory appears when all is well, and not at all otherwise.

    Args:
        model: an SReT, or a backbone with or without recursion.
        to: safetensors, torch-export or onnx.
        directory: a new one.
        origin: where the model comes from, which the file and the card say.

    Raises:
        SretError: as `check_export`; or the directory cannot be written to, a backbone cannot be
            exported, or the logits of the file and of the model on random images differ by more
            than 1e-4.
    """
    check_export(to, directory)
    start = time.perf_counter()
    make_directory(directory.parent)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    write: dict[str, Callable[[Any, Path, Origin], None]] = {
        "safetensors": write_safetensors,
        "torch-export": write_torch_export,
        "onnx": write_onnx,
    }
    try:
        path = make_directory(temporary) / FILES[to]
        write[to](model.eval(), path, origin)
        seconds = time.perf_counter() - start
        difference = logits_difference(model, to, path)
        # ONNX keeps weights of more than 2 GB in a file beside the program.
        size = sum(f.stat().st_size for f in temporary.iterdir() if f.name != CONFIG_FILE)
        card = model_card(model, to, path, size, difference, origin)
        write_atomically(temporary / CARD_FILE, card)
        os.replace(temporary, directory)
    except OSError as error:
        raise cannot_write(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Export(directory / FILES[to], size, difference, seconds)


def logits_difference(model: Any, to: str, path: Path) -> float:
    """The largest difference between the logits of a file and of its model on random images.

    Raises:
        SretError: it is more than 1e-4, or the model's logits are not finite.
    """
    spec, generator = model.spec, torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in BATCH_SIZES:
        images = torch.randn(
            batch, spec.in_chans, spec.img_size, spec.img_size, generator=generator
        )
        with torch.no_grad():
            expected = model(images)
        if not expected.isfinite().all():
            raise SretError(
                "the model's logits are not finite; train it again, or choose another", CHECKPOINT
            )
        with torch.no_grad():
            found = run_file(to, path, images)
        difference = float((found - expected).abs().max())
        if not difference <= TOLERANCE:
            raise SretError(
                f"the logits of the {to} program differ from the model's by {difference:.2g} for "
                f"{batch} images, more than {TOLERANCE:g}; nothing was written; use another format",
                CHECKPOINT,
            )
        largest = max(largest, difference)
    return largest
