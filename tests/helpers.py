"""What several test files use: small specs, images, files, and small models of twelve families.

The families are in timm's registry as `vit_small`, `swin_small` ...
"""

import io
import os
import signal
import tarfile
import zlib
from functools import partial

import numpy as np
import torch
from PIL import Image
from timm.layers import GatedMlp
from timm.models import build_model_with_cfg, register_model
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.mlp_mixer import Affine, MixerBlock, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sret_cli.cost.trace import known_costs
from sret_cli.model.backbone import build_backbone
from sret_cli.model.sret import build_model
from sret_cli.report.card import model_card
from sret_cli.runtime.files import write_json
from sret_cli.spec.backbone import BackboneSpec
from sret_cli.spec.model import ModelSpec
from sret_cli.spec.presets import PRESETS
from sret_cli.spec.train import TrainSpec
from sret_cli.study.file import study_from_tables
from sret_cli.study.rows import planned_row
from sret_cli.weights.export import UNKNOWN_ORIGIN, export_model
from sret_cli.weights.reference import to_reference

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
MIXER = {"patch_size": 8, "embed_dim": 32, "num_blocks": 4}

# The twelve families, each with four blocks in all but PiT (2 + 2 + 2) and Swin (2 + 4).
FAMILIES = {
    "vit": (VisionTransformer, SMALL),
    "deit": (VisionTransformerDistilled, SMALL),
    "deit3": (VisionTransformer, {**SMALL, "no_embed_class": True, "init_values": 0.1}),
    "beit": (Beit, {**SMALL, "use_abs_pos_emb": False, "use_rel_pos_bias": True}),
    "eva": (Eva, {**SMALL, "use_rot_pos_emb": True, "swiglu_mlp": True, "qkv_fused": False}),
    "cait": (Cait, {**SMALL, "init_values": 0.1}),
    "xcit": (Xcit, {**SMALL, "eta": 0.1}),
    "mixer": (MlpMixer, {**MIXER, "block_layer": MixerBlock}),
    "resmlp": (MlpMixer, {**MIXER, "block_layer": ResBlock, "norm_layer": Affine, "mlp_ratio": 4}),
    "gmlp": (
        MlpMixer,
        {**MIXER, "block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp, "mlp_ratio": 4},
    ),
    "pit": (
        PoolingVisionTransformer,
        {
            **{"patch_size": 8, "stride": 4, "base_dims": (16,) * 3, "depth": (2, 2, 2)},
            **{"heads": (1, 2, 4), "mlp_ratio": 2},
        },
    ),
    "swin": (
        SwinTransformer,
        {"embed_dim": 16, "depths": (2, 4), "num_heads": (2, 4), "window_size": 4},
    ),
}
BLOCKS = {"pit": [2, 2, 2], "swin": [2, 4]}


def small_model(name, cls, values, pretrained=False, **given):
    return build_model_with_cfg(cls, name, pretrained, **{**values, **given})


for family_name, (family_class, family_values) in FAMILIES.items():
    create = partial(small_model, f"{family_name}_small", family_class, family_values)
    create.__name__, create.__module__ = f"{family_name}_small", __name__
    register_model(create)


def backbone_spec(family, **values):
    return BackboneSpec(
        **{"backbone": f"{family}_small", "img_size": 32, "num_classes": 10, **values}
    )


def backbone_model(family, seed=0, **values):
    torch.manual_seed(seed)
    model = build_backbone(backbone_spec(family, **values))
    for parameter in model.parameters():  # MLP-Mixer's head is all zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def backbone_images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(backbone_images())


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


TINY = ModelSpec(
    img_size=16,
    num_classes=10,
    stem_strides=(1, 2, 1),
    embed_dims=(8, 16, 32),
    num_heads=(1, 2, 4),
    blocks=(1, 2, 1),
    slices=(4, 2, 1),
    recursive_slices=(2, 2, 1),
)


# A training of some seconds, as `sret` takes it.
QUICK = (
    *("train", "--preset", "nano", "--epochs", 1, "--batch-size", 240, "--device", "cpu"),
    *("--set", "model.embed_dims=[8, 16, 32]", "--set", "train.warmup_epochs=0"),
)

UNSLICED = {"slices": 1, "recursive_slices": 1}


# Measured by running the reference implementation under fvcore 0.1.5.post20221221, batch of one.
REFERENCE = [
    ("sret_t", {}, 4_755_979, 1_121_665_792),
    ("sret_t", UNSLICED, 4_755_979, 1_374_904_064),
    ("sret_lt", {}, 4_988_024, 1_173_698_304),
    ("sret_lt", UNSLICED, 4_988_024, 1_426_936_576),
    ("sret_s", {}, 20_899_692, 4_190_973_192),
    ("sret_s", UNSLICED, 20_899_692, 4_689_536_040),
]


def torch_products(model, images):
    """Multiply-adds of the matrix products and convolutions of a model, as torch counts them.

    Attention is computed by its plain matrix products, which every release of torch counts; its
    fused kernel for the CPU is counted as nothing by releases before 2.15.
    """
    counter = FlopCounterMode(display=False)  # two for a multiply-add, and nothing for norms
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() / 2


def fill(key, shape):
    """A tensor's values from the first key under which it appears, as the reference was filled."""
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        return abs(r) * 0.1 + 1
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if ".coefficient" in key:
        return 1 + 0.1 * r
    if key.endswith((".bias", "running_mean")):
        return 0.02 * r
    layer = ("x." + key).rsplit(".", 2)[-2]
    return 1 + 0.02 * r if layer.startswith(("norm", "bn")) else 0.05 * r


def small(**values):
    """A model that the reference could be asked for: a stem of stride 8, 2 recursions, NLLs."""
    spec = PRESETS["sret_t"].with_values(
        **{"img_size": 64, "num_classes": 10, "blocks": 1, **values}
    )
    return spec.with_values(embed_dims=(8, 16, 32), num_heads=(1, 2, 4))


def filled(spec):
    """A built model of random weights, coefficients and statistics."""
    torch.manual_seed(1)
    model = build_model(spec)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
    return model


def assert_same(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def write_export(model, to, directory, origin=UNKNOWN_ORIGIN):
    """An export with its model card, as `sret export` writes it."""
    return export_model(
        model,
        to,
        directory,
        origin,
        card=lambda export: model_card(model.spec, known_costs(model), to, export, origin),
    )


def saved(model, path):
    torch.save({"model": to_reference(model.spec, model.state_dict())}, path)
    return path


HEADS = ("--set", "model.num_heads=[1, 2, 4]")


NANO = PRESETS["nano"]


def png(level, size=(20, 20)):
    """A grey image as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def data_spec(dataset, data_dir=None, **values):
    values = {"batch_size": 2, "scale": (1.0, 1.0), "hflip": 0.0, **values}
    return TrainSpec(dataset=dataset, data_dir=data_dir and str(data_dir), **values)


def levels(loader, epoch=0):
    """The level of each image of an epoch, and its class."""
    return [
        (int(image[0, 0, 0]), int(target))
        for x, targets in loader.epoch(epoch)
        for image, target in zip(x, targets, strict=True)
    ]


def write_tar(path, classes):
    with tarfile.open(path, "w") as tar:
        for name, shades in classes.items():
            for shade in shades:
                add(tar, f"{name}/{shade}.png", png(shade))


def stop_at(step):
    """Sends this process a signal as soon as a step is done."""
    return lambda done, total, text: done == step and os.kill(os.getpid(), signal.SIGTERM)


def study_rows(tops=(), **tables):
    """Planned rows of a study of `nano` on digits, with their costs, and top-1 in their order.

    Args:
        tops: top-1 of the first runs, in percent; the others were not trained.
        tables: tables of the study file, such as grid and twins.
    """
    tables = {"model": {"preset": "nano"}, "train": {}, **tables}
    rows = [planned_row(run) for run in study_from_tables("depth", tables).runs]
    for number, row in enumerate(rows):
        depth = row["layers"] or 4
        row |= {"params": 331_842, "macs": 10**6 * depth, "activation_bytes": 1000}
        row |= {"started_at": f"2026-01-01T00:00:{number:02}", "status": "done"}
    for row, top1 in zip(rows, tops, strict=False):
        row |= {"top1_percent": top1, "test_loss": 0.5, "test_images": 360}
    return rows


def write_rows(rows, runs):
    """Writes rows into run directories under `runs`, as training does; returns the directories."""
    directories = [runs / row["study"] / row["run_id"] for row in rows]
    for row, directory in zip(rows, directories, strict=True):
        directory.mkdir(parents=True)
        write_json(directory / "row.json", row)
    return directories
