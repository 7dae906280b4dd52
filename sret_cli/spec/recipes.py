"""The recipes: values for the fields of a training that are not given, with their sources."""

from typing import Any, NamedTuple

# DeiT's published training: arXiv 2012.12877, table 9, and the defaults of its main.py. timm omits
# its colour jitter (0.3) with RandAugment, so it is 0 here.
_DEIT: dict[str, Any] = {
    "epochs": 300,
    "batch_size": 1024,
    "opt": "adamw",
    "weight_decay": 0.05,
    "sched": "cosine",
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 5,
    "sched_on_updates": False,
    "smoothing": 0.1,
    "clip_grad": 0.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "model_ema_decay": 0.99996,
    "scale": (0.08, 1),
    "color_jitter": 0.0,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
    "aug_repeats": 3,
}


# The fields that each recipe sets; `RATES` has its lr for 512 images a step, and the drop path of
# its models. docs/training.md has a table of the differences from the sources.
RECIPES: dict[str, dict[str, Any]] = {
    "none": {},
    "sret": {**_DEIT, "warmup_epochs": 30},  # as in SReT's released training
    "deit": _DEIT,
    "finetune": {  # DeiT's fine-tuning at 384 px: the command in its README
        **_DEIT,
        "epochs": 30,
        "batch_size": 512,
        "weight_decay": 1e-8,
        "min_lr": 5e-6,
    },
    "small": {  # ours, for 32 px
        "epochs": 50,
        "batch_size": 128,
        "warmup_epochs": 2,
        "weight_decay": 0.05,
        "mixup": 0.2,
        "cutmix": 0.5,
        "scale": (0.5, 1),
        "auto_augment": "rand-m7-mstd0.5-inc1",
        "reprob": 0.1,
    },
}


class Rates(NamedTuple):
    """A recipe's learning rate for 512 images a step, and the drop path of its models."""

    lr: float
    drop_path_rate: float


# Augmentation that is off with stored soft labels: their teacher saw only crops and flips.
UNLABELLED: dict[str, Any] = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "auto_augment": None,
    "color_jitter": 0.0,
    "reprob": 0.0,
}


RATES = {
    "sret": Rates(1e-3, 0.1),
    "deit": Rates(5e-4, 0.1),
    "finetune": Rates(5e-6, 0.0),  # DeiT fine-tunes with its models in evaluation mode
    "small": Rates(4e-3, 0.05),
}
