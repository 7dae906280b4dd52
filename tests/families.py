"""Small models of twelve families, in timm's registry as `vit_small`, `swin_small` ..."""

from functools import partial

import torch
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

from sret_cli.backbone import BackboneSpec
from sret_cli.recurse import build_backbone

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


def spec_of(family, **values):
    return BackboneSpec(
        **{"backbone": f"{family}_small", "img_size": 32, "num_classes": 10, **values}
    )


def model_of(family, seed=0, **values):
    torch.manual_seed(seed)
    model = build_backbone(spec_of(family, **values))
    for parameter in model.parameters():  # MLP-Mixer's head is all zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(images())


def size(model):
    return sum(p.numel() for p in model.parameters())
