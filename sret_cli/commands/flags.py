"""What commands share: their flags, where output goes, and the study that flags describe."""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from sret_cli.commands.completion import (
    DEVICES,
    PRECISIONS,
    choices,
    datasets,
    presets,
    recipes,
    studies,
)

StudyFile = Annotated[
    Path | None,
    typer.Argument(metavar="[STUDY]", help="A study file (TOML).", autocompletion=studies),
]
Preset = Annotated[
    str | None,
    typer.Option(help="sret_t, sret_lt, sret_s, deep, nano …", autocompletion=presets),
]
Layers = Annotated[int | None, typer.Option(help="Layers (passes) in all: sets the recursions.")]
Backbone = Annotated[str | None, typer.Option(help="A model of timm's, in the preset's place.")]
Recursions = Annotated[int | None, typer.Option(help="Passes through each block.")]
Share = Annotated[
    str | None, typer.Option(help="A backbone's blocks with one set of weights: N or all.")
]
Slices = Annotated[int | None, typer.Option(help="Slices of all passes; each stage takes the gcd.")]
LaterSlices = Annotated[int | None, typer.Option(help="Slices of the later passes alone.")]
Nll = Annotated[
    str | None,
    typer.Option(
        help="per_pass, per_block or none.",
        autocompletion=choices("per_pass", "per_block", "none"),
    ),
]
ImgSize = Annotated[int | None, typer.Option(help="Height and width of the images.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes; those of the data if not given.")]
Params = Annotated[str | None, typer.Option(help="Parameters, by the width: 14M (within 1 %).")]
Macs = Annotated[str | None, typer.Option(help="FLOPs, by the width: 4.2G (within 1 %).")]
Twin = Annotated[
    str | None,
    typer.Option(
        help="The untied control: layers, params or macs.",
        autocompletion=choices("layers", "params", "macs"),
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other field: model.mlp_ratio=4.")]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="digits, folder, tar, hfds, hfds/NAME, wds or torch/NAME.", autocompletion=datasets
    ),
]
DataDir = Annotated[str | None, typer.Option(help="A folder with train/ and test/ or val/.")]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="Random images, for measuring speed.")]
OnBadImage = Annotated[
    str | None,
    typer.Option(
        help="An image that cannot be read: stop, or skip and count it.",
        autocompletion=choices("stop", "skip"),
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training.")]
BatchSize = Annotated[int | None, typer.Option(help="Images a step.")]
Seed = Annotated[int | None, typer.Option(help="Of the weights, the order and the augmentation.")]
LearningRate = Annotated[float | None, typer.Option(help="The highest learning rate.")]
WeightDecay = Annotated[float | None, typer.Option(help="Of the optimiser.")]
Recipe = Annotated[
    str | None,
    typer.Option(help="A published recipe: sret, deit, finetune, small.", autocompletion=recipes),
]
Precision = Annotated[str | None, typer.Option(help="fp32 or bf16.", autocompletion=PRECISIONS)]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile",
        help="Compile passes: on, off or auto (where it can be).",
        autocompletion=choices("on", "off", "auto"),
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", autocompletion=DEVICES)]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that load images.")]
Recompute = Annotated[str | None, typer.Option(help="none, pass, auto, or passes a segment.")]
GpuMemory = Annotated[str | None, typer.Option(help="A budget: 80G is 80e9 bytes.")]
EverySteps = Annotated[int | None, typer.Option(min=1, help="Save after every so many steps, too.")]
Minutes = Annotated[float, typer.Option(min=0, help="Save after so many minutes, too; 0: never.")]
Tensorboard = Annotated[bool, typer.Option("--tensorboard", help="Write for TensorBoard, too.")]
Shard = Annotated[bool, typer.Option("--shard", help="Share weights out among processes (FSDP).")]
Runs = Annotated[Path, typer.Option(help="Where run directories are.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
MODEL = {
    **{"preset": Preset, "backbone": Backbone, "layers": Layers, "recursions": Recursions},
    **{"share": Share, "slices": Slices, "recursive_slices": LaterSlices, "nll": Nll},
    **{"img_size": ImgSize, "num_classes": NumClasses, "params": Params, "macs": Macs},
    **{"twin": Twin, "set_": Set},
}
MODEL_FLAGS = tuple(name for name in MODEL if name != "set_")
TRAINING = {
    **{"device": Device, "workers": Workers, "gpu_memory": GpuMemory},
    **{"checkpoint_every_steps": EverySteps, "checkpoint_minutes": Minutes},
    **{"tensorboard": Tensorboard, "shard": Shard},
}
TRAIN_FLAGS = (
    *("dataset", "data_dir", "on_bad_image", "recipe", "epochs", "batch_size", "lr"),
    *("weight_decay", "seed", "precision"),
)
DEFAULTS: dict[str, Any] = {
    **{"device": "auto", "checkpoint_minutes": 10.0, "tensorboard": False, "shard": False},
}


def with_flags(flags: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command more flags, behind its arguments; it finds them in its context."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command).parameters.values() if p.kind != Parameter.VAR_KEYWORD]
        last = sum(p.kind == Parameter.POSITIONAL_OR_KEYWORD for p in own)
        own[last:last] = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=DEFAULTS.get(name), annotation=kind)
            for name, kind in flags.items()
        ]
        command.__signature__ = Signature(own)  # type: ignore[attr-defined]
        return command

    return decorate
