"""How people read rows: headings and units of measurements, and names of fields."""

import math
from dataclasses import dataclass

FLOPS_NOTE = "FLOPs: one multiply-add counts as one."


@dataclass(frozen=True)
class Column:
    """How a measurement is shown: heading with unit, divisor to that unit, decimals."""

    heading: str
    divisor: float
    decimals: int

    def text(self, value: float, half_width: float | None = None) -> str:
        """The value in the column's unit, with the half-width of its interval if it has one."""
        shown, decimals = value / self.divisor, self.decimals
        if decimals > 1 and 0 < abs(shown) < 0.1:  # three significant digits
            decimals = 2 - math.floor(math.log10(abs(shown)))
        text = f"{shown:,.{decimals}f}"
        if half_width is None:
            return text
        return f"{text} ± {half_width / self.divisor:,.{decimals}f}"

    def difference(self, value: float, half_width: float | None = None) -> str:
        """A difference of two values, with its sign and with the column's decimals."""
        text = f"{value / self.divisor:+,.{self.decimals}f}"
        if half_width is None:
            return text
        return f"{text} ± {half_width / self.divisor:,.{self.decimals}f}"


# What seeds measure differently; all other columns follow from the spec or count things.
VARYING = (
    *("forward_seconds", "step_seconds", "inference_images_per_second"),
    *("training_images_per_second", "images_per_second", "train_seconds"),
    *("final_loss", "test_loss", "top1_percent", "top5_percent", "best_top1_percent"),
    *("mean_class_top1_percent", "ema_test_loss", "ema_top1_percent", "ema_top5_percent"),
)
ACCURACIES = ("top1_percent", "top5_percent", "ema_top1_percent", "ema_top5_percent")

COLUMNS = {
    "recursions": Column("Recursions", 1, 0),
    "layers": Column("Layers", 1, 0),
    "params": Column("Params (M)", 1e6, 2),
    "macs": Column("FLOPs (G)", 1e9, 3),
    "activations": Column("Activations (M)", 1e6, 2),
    "activation_bytes": Column("Kept for backward (MB/image)", 1e6, 2),
    "peak_memory_bytes": Column("Peak memory (MB)", 1e6, 0),
    "measured_batch_size": Column("Batch", 1, 0),
    "forward_seconds": Column("Forward (ms)", 1e-3, 1),
    "step_seconds": Column("Training step (ms)", 1e-3, 1),
    "inference_images_per_second": Column("Inference (images/s)", 1, 1),
    "training_images_per_second": Column("Training (images/s)", 1, 1),
    "images_per_second": Column("Training run (images/s)", 1, 0),
    "memory_batch_size": Column("Batch", 1, 0),
    "weight_bytes": Column("Weights (MB)", 1e6, 0),
    "gradient_bytes": Column("Gradients (MB)", 1e6, 0),
    "optimizer_bytes": Column("Optimizer (MB)", 1e6, 0),
    "kept_bytes": Column("Kept for backward (MB)", 1e6, 0),
    "transient_bytes": Column("Transient (MB)", 1e6, 0),
    "training_memory_bytes": Column("Training step (MB)", 1e6, 0),
    "inference_memory_bytes": Column("Inference (MB)", 1e6, 0),
    "largest_batch": Column("Largest batch", 1, 0),
    "epochs_trained": Column("Epochs", 1, 0),
    "images_seen": Column("Images seen (M)", 1e6, 2),
    "train_seconds": Column("Training (s)", 1, 0),
    "final_loss": Column("Training loss", 1, 3),
    "test_loss": Column("Test loss", 1, 3),
    "top1_percent": Column("Top-1 (%)", 1, 2),
    "top5_percent": Column("Top-5 (%)", 1, 2),
    "mean_class_top1_percent": Column("Mean per-class top-1 (%)", 1, 2),
    "best_top1_percent": Column("Best top-1 of all epochs (%)", 1, 2),
    "ema_test_loss": Column("Test loss, averaged weights", 1, 3),
    "ema_top1_percent": Column("Top-1, averaged weights (%)", 1, 2),
    "ema_top5_percent": Column("Top-5, averaged weights (%)", 1, 2),
    "test_images": Column("Test images", 1, 0),
    "published_gmacs": Column("Published FLOPs (G)", 1, 1),
    "published_params_m": Column("Published params (M)", 1, 1),
    "params_m_minus_published": Column("Params − published (M)", 1, 1),
    "gmacs_minus_published": Column("FLOPs − published (G)", 1, 1),
    "published_top1_percent": Column("Published top-1 (%)", 1, 1),
    "published_distilled_top1_percent": Column("Published top-1, distilled (%)", 1, 1),
}


# Names for people; a field that is not here is its own name in plain words.
FIELDS = {
    "name": "Model",
    "role": "Role",
    "study": "Study",
    "run_id": "Run",
    "twin_of": "Twin of",
    "continues": "Continues run",
    "model.img_size": "Image size (px)",
    "model.in_chans": "Image channels",
    "model.num_classes": "Classes",
    "model.stem_strides": "Strides of the stem",
    "model.embed_dims": "Width",
    "model.num_heads": "Heads",
    "model.blocks": "Blocks",
    "model.recursions": "Recursions",
    "model.loop": "Loop",
    "model.order": "Order of blocks",
    "model.slices": "Slices",
    "model.recursive_slices": "Slices of later passes",
    "model.shuffle": "Shuffle",
    "model.mlp_ratio": "MLP ratio",
    "model.nll": "NLLs",
    "model.nll_ratio": "NLL ratio",
    "model.residual": "Residual",
    "model.lrc": "LRC",
    "model.drop_rate": "Dropout",
    "model.attn_drop_rate": "Attention dropout",
    "model.drop_path_rate": "Drop path",
    "model.drop_path_ramp": "Drop-path ramp",
    "model.backbone": "Backbone",
    "model.share": "Blocks that share weights",
    "model.timm_args": "timm arguments",
    "train.data_dir": "Data directory",
    "train.epochs": "Epochs",
    "train.accumulation": "Parts of a step",
    "train.opt": "Optimizer",
    "train.lr": "Learning rate",
    "train.layer_decay": "Layer decay",
    "train.sched": "Schedule",
    "train.min_lr": "Final learning rate",
    "train.warmup_lr": "Warm-up learning rate",
    "train.warmup_epochs": "Warm-up epochs",
    "train.sched_on_updates": "Schedule by steps",
    "train.smoothing": "Label smoothing",
    "train.clip_grad": "Gradient clipping",
    "train.mixup": "Mixup",
    "train.cutmix": "CutMix",
    "train.model_ema_decay": "EMA decay",
    "train.model_ema_warmup": "EMA warm-up",
    "train.init": "Initial weights",
    "train.reset_head": "New head",
    "train.teacher_img_size": "Teacher's image size (px)",
    "train.distill_temperature": "Distillation temperature",
    "train.scale": "Crop scale",
    "train.crop_pct": "Crop of test images",
    "train.hflip": "Horizontal flip",
    "train.auto_augment": "AutoAugment",
    "train.reprob": "Random erasing",
    "train.aug_repeats": "Repeated augmentation",
    "train.compile": "Compilation",
    "train.recompute": "Recomputation",
    "train.recursions_range": "Range of recursions",
}


def heading(column: str) -> str:
    """The heading of a column, or the label of an axis: "Learning rate" for `train.lr`."""
    if column in COLUMNS:
        return COLUMNS[column].heading
    if column in FIELDS:
        return FIELDS[column]
    words = column.rpartition(".")[2].replace("_", " ").strip()
    return words[:1].upper() + words[1:] or column
