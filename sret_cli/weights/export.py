"""Writes models as safetensors, torch.export or ONNX files, checks them, and adds a model card."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sret_cli.runtime.errors import CHECKPOINT, USAGE, SretError, nearest_choice
from sret_cli.runtime.files import cannot_write_error, make_directory, write_atomically
from sret_cli.spec.run import CONFIG_FILE
from sret_cli.weights.origin import Origin
from sret_cli.weights.program import backbone_errors_as_refusals, to_program
from sret_cli.weights.store import WEIGHTS_FILE, load_model, save_model

FILES = {"safetensors": WEIGHTS_FILE, "torch-export": "model.pt2", "onnx": "model.onnx"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CARD_FILE = "README.md"
TOLERANCE = 1e-4  # between the logits of the program and of the model
BATCH_SIZES = (1, 3)  # batches of random images for which the logits are compared
METADATA_FILE = "metadata.json"  # inside a program of torch.export
METADATA_KEY = "sret"  # a single key of safetensors: it writes several in random order
UNKNOWN_ORIGIN = Origin("model")


def write_safetensors(model: Any, path: Path, origin: Origin = UNKNOWN_ORIGIN) -> None:
    """Writes `config.json` and the weights, whose metadata are JSON under the key "sret"."""
    metadata = json.dumps(origin.metadata(model.spec), ensure_ascii=False)
    save_model(model, path.parent, origin.config(), {METADATA_KEY: metadata})


def write_torch_export(model: Any, path: Path, origin: Origin = UNKNOWN_ORIGIN) -> None:
    """Writes the program in torch.export's format, with a file `metadata.json` inside it."""
    metadata = json.dumps(origin.metadata(model.spec), indent=2, ensure_ascii=False)
    torch.export.save(to_program(model), path, extra_files={METADATA_FILE: metadata})


def write_onnx(model: Any, path: Path, origin: Origin = UNKNOWN_ORIGIN) -> None:
    """Writes the program in ONNX, with metadata; its input is `images`, its output `logits`."""
    from onnx_ir.passes.common import DeduplicateInitializersPass

    for name in ("onnx_ir", "onnxscript"):  # silences notes about loops and splits
        logging.getLogger(name).setLevel(logging.ERROR)
    exported = to_program(model)
    with backbone_errors_as_refusals(model.spec, "in ONNX"):
        program = torch.onnx.export(
            exported,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # The optimizer has copied small transposed weights for each loop that uses them.
    DeduplicateInitializersPass(size_limit=2**62)(program.model)
    program.model.metadata_props.update(origin.metadata(model.spec))
    program.save(path)


def run_file(to: str, path: Path, images: Tensor) -> Tensor:
    """Logits of a batch of images from an exported file."""
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
    """What was written.

    Attributes:
        file: the file.
        file_bytes: its size, with files of weights next to it.
        logits_difference: largest difference between its logits and the model's.
        export_seconds: time to write it.
    """

    file: Path
    file_bytes: int
    logits_difference: float
    export_seconds: float

    def __str__(self) -> str:
        """The export in one line."""
        return (
            f"{self.file}: {self.file_bytes / 1e6:.1f} MB in {self.export_seconds:.1f} s; its "
            f"logits are within {self.logits_difference:.1g} of the model's"
        )


def check_export(to: str, directory: Path) -> None:
    """Refuses an impossible export before anything is written.

    Raises:
        SretError: the format is unknown, its packages are not installed, or the directory exists or
            looks like a file.
    """
    if to not in FILES:
        raise SretError(f"unknown format {to!r}; {nearest_choice(to, list(FILES))}", USAGE)
    missing = [name for name in ONNX_PACKAGES if to == "onnx" and find_spec(name) is None]
    if missing:
        raise SretError(
            f"--to onnx needs {', '.join(missing)}; install it with pip install 'sret[onnx]'", USAGE
        )
    if directory.exists():
        raise SretError(f"{directory} already exists; choose another directory", USAGE)
    if directory.suffix in {Path(name).suffix for name in FILES.values()}:
        raise SretError(
            f"--out {directory} looks like a file; name the directory that gets {FILES[to]} and "
            f"{CARD_FILE}",
            USAGE,
        )


def export_model(
    model: Any,
    to: str,
    directory: Path,
    origin: Origin = UNKNOWN_ORIGIN,
    card: Callable[[Export], str] | None = None,
) -> Export:
    """Writes a model in another format, and checks it.

    The directory is created only if all steps succeed.

    Args:
        model: an SReT, or a timm model with or without recursion.
        to: safetensors, torch-export or onnx.
        directory: a new directory.
        origin: where the model comes from; written into the file.
        card: returns the text of the model card, which is written next to the file.

    Raises:
        SretError: as `check_export`; or the directory cannot be written to, a timm model cannot be
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
        # ONNX keeps weights of more than 2 GB in a file next to the program.
        size = sum(f.stat().st_size for f in temporary.iterdir() if f.name != CONFIG_FILE)
        export = Export(directory / FILES[to], size, difference, seconds)
        if card is not None:
            write_atomically(temporary / CARD_FILE, card(export))
        os.replace(temporary, directory)
    except OSError as error:
        raise cannot_write_error(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return export


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
                "the model's logits are not finite; train it again, or export another model",
                CHECKPOINT,
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
