"""The flags that several commands have, each with its type, help and completion.

A command's flags are its parameters. A flag that several commands have is an alias here, such as
`Preset`; a command lists it as `preset: Preset = None`, one a line. Commands need not read each of
them: `arguments.py` takes the flags of `[model]`, `[train]` and `RunOptions` from the command's
context, by the lists of names at the end of this file.
"""

from pathlib import Path
from typing import Annotated

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

# The sections of a command's help, in this order.
MODEL = "Model"
DATA = "Data"
TRAINING = "Training"
REPORT = "What is shown"
RUNNING = "Many runs"
WHERE = "Where and how"
PANELS = (MODEL, DATA, TRAINING, REPORT, RUNNING, WHERE)

StudyFile = Annotated[
    Path | None,
    typer.Argument(metavar="STUDY", help="Study file (TOML).", autocompletion=studies),
]

Preset = Annotated[
    str | None,
    typer.Option(
        help="Named model: sret_t, sret_lt, sret_s, deep, nano …",
        autocompletion=presets,
        rich_help_panel=MODEL,
    ),
]
Backbone = Annotated[
    str | None, typer.Option(help="timm model, in place of --preset.", rich_help_panel=MODEL)
]
Layers = Annotated[
    int | None,
    typer.Option(help="Total layers (passes); sets the recursions.", rich_help_panel=MODEL),
]
Recursions = Annotated[
    int | None, typer.Option(help="Passes through each block.", rich_help_panel=MODEL)
]
Share = Annotated[
    str | None,
    typer.Option(
        help="Consecutive backbone blocks with one set of weights: N or all.",
        rich_help_panel=MODEL,
    ),
]
Slices = Annotated[
    int | None,
    typer.Option(
        help="Slices in all passes; each stage takes the gcd with its tokens.",
        rich_help_panel=MODEL,
    ),
]
LaterSlices = Annotated[
    int | None,
    typer.Option(help="Slices in later passes only.", rich_help_panel=MODEL),
]
Nll = Annotated[
    str | None,
    typer.Option(
        help="Non-linear layers: per_pass, per_block or none.",
        autocompletion=choices("per_pass", "per_block", "none"),
        rich_help_panel=MODEL,
    ),
]
ImgSize = Annotated[
    int | None, typer.Option(help="Height and width of the images.", rich_help_panel=MODEL)
]
NumClasses = Annotated[
    int | None,
    typer.Option(help="Classes; those of the data if not given.", rich_help_panel=MODEL),
]
Params = Annotated[
    str | None,
    typer.Option(help="Fit the width to these parameters: 14M.", rich_help_panel=MODEL),
]
Macs = Annotated[
    str | None,
    typer.Option(help="Fit the width to these FLOPs: 4.2G.", rich_help_panel=MODEL),
]
Twin = Annotated[
    str | None,
    typer.Option(
        help="Untied control: layers, params or macs.",
        autocompletion=choices("layers", "params", "macs"),
        rich_help_panel=MODEL,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="<key=value>",
        help="Any other field: model.mlp_ratio=4. Repeatable.",
        rich_help_panel=MODEL,
    ),
]

Dataset = Annotated[
    str | None,
    typer.Option(
        help="digits, folder, tar, hfds, hfds/NAME, wds or torch/NAME.",
        autocompletion=datasets,
        rich_help_panel=DATA,
    ),
]
DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with train/ and test/ or val/.", rich_help_panel=DATA),
]
Synthetic = Annotated[
    bool,
    typer.Option("--synthetic", help="Random images, to measure speed.", rich_help_panel=DATA),
]
OnBadImage = Annotated[
    str | None,
    typer.Option(
        help="At an image that cannot be read: stop, or skip and count it.",
        autocompletion=choices("stop", "skip"),
        rich_help_panel=DATA,
    ),
]

Recipe = Annotated[
    str | None,
    typer.Option(
        help="Values for fields that are not given: sret, deit, finetune or small.",
        autocompletion=recipes,
        rich_help_panel=TRAINING,
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training.", rich_help_panel=TRAINING)]
BatchSize = Annotated[
    int | None, typer.Option(help="Images of one optimiser step.", rich_help_panel=TRAINING)
]
LearningRate = Annotated[
    float | None, typer.Option(help="Highest learning rate.", rich_help_panel=TRAINING)
]
WeightDecay = Annotated[float | None, typer.Option(help="Weight decay.", rich_help_panel=TRAINING)]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Random seed for weights, data order and augmentation.", rich_help_panel=TRAINING
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(help="fp32 or bf16.", autocompletion=PRECISIONS, rich_help_panel=TRAINING),
]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile",
        help="Compile each kind of pass: on, off, or auto (if there is a compiler).",
        autocompletion=choices("on", "off", "auto"),
        rich_help_panel=TRAINING,
    ),
]
Recompute = Annotated[
    str | None,
    typer.Option(
        help="What the backward pass recomputes: none, pass, auto, or segments of N passes.",
        rich_help_panel=TRAINING,
    ),
]

Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda or cuda:N.", autocompletion=DEVICES, rich_help_panel=WHERE),
]
Workers = Annotated[
    int | None,
    typer.Option(metavar="<int>", min=0, help="Processes that load images.", rich_help_panel=WHERE),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(help="Memory budget: 80G is 80e9 bytes.", rich_help_panel=WHERE),
]
CheckpointEverySteps = Annotated[
    int | None,
    typer.Option(
        metavar="<int>", min=1, help="Also save after every N steps.", rich_help_panel=WHERE
    ),
]
CheckpointMinutes = Annotated[
    float,
    typer.Option(
        metavar="<float>",
        min=0,
        help="Also save N minutes after the last time; 0: never.",
        rich_help_panel=WHERE,
    ),
]
Tensorboard = Annotated[
    bool,
    typer.Option(
        "--tensorboard", help="Also write metrics for TensorBoard.", rich_help_panel=WHERE
    ),
]
Shard = Annotated[
    bool,
    typer.Option(
        "--shard", help="Shard the weights over the processes (FSDP).", rich_help_panel=WHERE
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        help="Where runs are done: local, ray or slurm.",
        autocompletion=choices("local", "ray", "slurm"),
        rich_help_panel=RUNNING,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster: HOST:PORT.", rich_help_panel=RUNNING),
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<options>",
        help="Options of sbatch: partition=gpu,gres=gpu:1,time=240.",
        rich_help_panel=RUNNING,
    ),
]
Wait = Annotated[
    bool,
    typer.Option("--wait", help="Wait for the end of a Slurm job.", rich_help_panel=RUNNING),
]
Jobs = Annotated[
    str,
    typer.Option(
        metavar="<N|auto>",
        help="Runs at a time, each in a process of its own; auto: what is fastest here.",
        rich_help_panel=RUNNING,
    ),
]
GpusPerRun = Annotated[
    int,
    typer.Option(min=1, help="GPUs that train one run together.", rich_help_panel=RUNNING),
]
RunsPerGpu = Annotated[
    int, typer.Option(min=1, help="Runs that share a GPU.", rich_help_panel=RUNNING)
]
Retries = Annotated[
    int,
    typer.Option(
        min=0, help="How often a run resumes after its process died.", rich_help_panel=RUNNING
    ),
]
Retry = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<failed|lost>",
        help="Do runs again that failed or were lost before.",
        rich_help_panel=RUNNING,
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        metavar="<condition>",
        help="Do these runs only: 'model.recursions == 4'.",
        rich_help_panel=RUNNING,
    ),
]
MaxRuns = Annotated[
    int | None,
    typer.Option(min=1, help="Needed above 10,000 runs.", rich_help_panel=RUNNING),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="List the runs with their costs and predicted times; start nothing.",
        rich_help_panel=RUNNING,
    ),
]
FailFast = Annotated[
    bool,
    typer.Option("--fail-fast", help="Stop at the first run that fails.", rich_help_panel=RUNNING),
]
Runs = Annotated[Path, typer.Option(help="Directory of all runs.", rich_help_panel=WHERE)]
ReportOut = Annotated[
    Path | None,
    typer.Option(
        help="Directory of the report; report/ next to the rows if not given.",
        rich_help_panel=WHERE,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=WHERE)
]

# Parameters of commands that are fields of `[model]`; `--set` is not one field and stands apart.
MODEL_FLAGS = (
    "preset",
    "backbone",
    "layers",
    "recursions",
    "share",
    "slices",
    "recursive_slices",
    "nll",
    "img_size",
    "num_classes",
    "params",
    "macs",
    "twin",
)
# Those of `[train]` that need no conversion.
TRAIN_FLAGS = (
    "dataset",
    "data_dir",
    "on_bad_image",
    "recipe",
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "seed",
    "precision",
)
