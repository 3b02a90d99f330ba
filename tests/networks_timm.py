"""Architectures of timm, with few and narrow layers for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conftest import _declare_torchvision_operators
from tests.zoo_row import Built, Row, called, images
from torch import nn


def _timm() -> Any:
    _declare_torchvision_operators()
    import timm

    return timm


def _row(family: str, name: str, size: int = 32, real_size: int = 224, **tiny: Any) -> Row:
    """``tiny`` are the arguments that make the model small; none where timm's own test models are small already."""

    def built(size: int, **options: Any) -> Built:
        return _timm().create_model(name, **options), called(images(size))

    test_model = name.startswith("test_")
    return Row(
        f"timm-{name.replace('_', '-')}",
        family,
        "timm",
        lambda: built(size, num_classes=10, **tiny),
        None if test_model else lambda: built(real_size),
    )


def _class(family: str, name: str, build: Callable[[Any], nn.Module], size: int = 32, real_size: int = 224) -> Row:
    """The same where the small model needs its class itself; ``build`` is given ``timm.models``."""

    def tiny() -> Built:
        return build(_timm().models), called(images(size))

    def real() -> Built:
        return _timm().create_model(name), called(images(real_size))

    return Row(f"timm-{name.replace('_', '-')}", family, "timm", tiny, real)


def _mixer(models: Any, block: str = "MixerBlock", **options: Any) -> nn.Module:
    kind = models.mlp_mixer
    return kind.MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=24, block_layer=getattr(kind, block), **options)


def _resmlp(models: Any) -> nn.Module:
    return _mixer(models, "ResBlock", mlp_ratio=2, norm_layer=models.mlp_mixer.Affine)


def _gmlp(models: Any) -> nn.Module:
    return _mixer(models, "SpatialGatingBlock", mlp_ratio=2, mlp_layer=models.mlp_mixer.GatedMlp)


def _caformer(models: Any) -> nn.Module:
    kind = models.metaformer
    mixers = [kind.SepConv, kind.SepConv, kind.Attention, kind.Attention]
    norms = [kind.LayerNorm2dNoBias] * 2 + [kind.LayerNormNoBias] * 2
    return kind.MetaFormer(
        num_classes=10, depths=(1,) * 4, dims=(32, 32, 64, 64), token_mixers=mixers, norm_layers=norms
    )


def _cspnet(models: Any) -> nn.Module:
    kind = models.cspnet
    stages = kind.CspStagesCfg(
        depth=(1, 2),
        out_chs=(16, 24),
        stride=(2, 2),
        block_ratio=(1.0, 0.5),
        bottle_ratio=(0.5, 0.5),
        expand_ratio=(2.0, 1.0),
        cross_linear=True,
    )
    return kind.CspNet(kind.CspModelCfg(stem=kind.CspStemCfg(out_chs=12), stages=stages), num_classes=10)


_VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}

TIMM = (
    _row("ResNet variants", "test_resnet"),
    _row("ResNet variants", "resnet26d", layers=(1, 1, 1, 1)),
    _row("ResNet variants", "resnest14d", layers=(1, 1, 1, 1)),
    _row("ResNet variants", "skresnet18", layers=(1, 1, 1, 1)),
    _row("ResNet variants", "ecaresnet26t", layers=(1, 1, 1, 1)),
    _row("ResNet variants", "res2net50_26w_4s", layers=(1, 1, 1, 1)),
    _row("RepVGG and kin", "test_byobnet"),
    _row("RepVGG and kin", "mobileone_s0", size=32),
    _row("RepVGG and kin", "repvgg_a0", size=32),
    _row("EfficientNet", "test_efficientnet"),
    _row("EfficientNet", "ghostnet_050", size=64),
    _row("EfficientNet", "tf_efficientnetv2_b0", size=64),
    _row("MobileNet", "mobilenetv4_conv_small", size=64),
    _row("MobileNet", "mobilenetv1_100", size=64),
    _row("MobileNet", "rexnet_100", size=64, initial_chs=8, final_chs=16, width_mult=0.5),
    _row("ConvNeXt", "test_convnext"),
    _row("ConvNeXt", "convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)),
    _class(
        "ConvNeXt",
        "inception_next_tiny",
        lambda models: models.inception_next.MetaNeXt(num_classes=10, depths=(1,) * 4, dims=(16, 24, 32, 40)),
    ),
    _row("normaliser-free", "test_nfnet"),
    _row("ViT", "test_vit"),
    _row("ViT", "vit_relpos_small_patch16_224", **_VIT),
    _row("ViT", "cait_xxs24_224", **_VIT),
    _row("ViT", "beit_base_patch16_224", **_VIT),
    _row("ViT", "eva02_tiny_patch14_224", **{**_VIT, "embed_dim": 32}),
    _row("ViT", "xcit_nano_12_p16_224", **{**_VIT, "patch_size": 8}),
    _class("MLP-Mixer", "mixer_b16_224", _mixer),
    _class("MLP-Mixer", "resmlp_12_224", _resmlp),
    _class("MLP-Mixer", "gmlp_s16_224", _gmlp),
    _class(
        "ConvMixer",
        "convmixer_768_32",
        lambda models: models.convmixer.ConvMixer(20, 2, kernel_size=3, patch_size=4, num_classes=10),
    ),
    _class(
        "MetaFormer",
        "poolformer_s12",
        lambda models: models.metaformer.MetaFormer(num_classes=10, depths=(1,) * 4, dims=(8, 12, 16, 20)),
    ),
    _class("MetaFormer", "caformer_s18", _caformer),
    _row("hybrid", "test_coatnet", size=160, real_size=160),
    _row("hybrid", "mobilevit_xxs", size=64, real_size=256),
    _row("hybrid", "levit_128s", size=224),
    _row("hybrid", "efficientformer_l1", size=224),
    _row("hybrid", "edgenext_xx_small", size=64, real_size=256),
    _row("hierarchical ViT", "pvt_v2_b0", depths=(1, 1, 1, 1), size=64),
    _row("hierarchical ViT", "twins_svt_small", depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), size=64, img_size=64),
    _class(
        "hierarchical ViT",
        "focalnet_tiny_srf",
        lambda models: models.focalnet.FocalNet(num_classes=10, embed_dim=16, depths=(1,) * 4),
        size=64,
    ),
    _row("state space and gates", "test_mambaout"),
    _row("multi-resolution", "hrnet_w18_small", size=64),
    _row("aggregation", "dla34", size=32, channels=(8, 8, 12, 16, 20, 24)),
    _row("aggregation", "dpn48b", size=32),
    _class("aggregation", "cspresnet50", _cspnet),
    _row("aggregation", "ese_vovnet19b_slim_dw", size=32),
    _row("Inception", "xception41", size=64, real_size=299),
)
