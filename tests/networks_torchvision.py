"""Architectures of torchvision, and small versions of them where their constructors allow it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tests.conftest import _declare_torchvision_operators
from tests.zoo_row import Built, Row, called, images
from torch import nn


def _models() -> Any:
    _declare_torchvision_operators()
    import torchvision

    return torchvision.models


def _row(
    family: str,
    name: str,
    tiny: Callable[[Any], nn.Module] | None = None,
    size: int = 32,
    real_size: int = 224,
    **options: Any,
) -> Row:
    """The row of a classifier; without ``tiny``, the real one with ten classes stands in for it on small pictures."""

    def small() -> Built:
        model = tiny(_models()) if tiny else getattr(_models(), name)(num_classes=10, **options)
        return model, called(images(size))

    def real() -> Built:
        # RegNet reads its widths from tensors while it is built, which `meta` tensors do not have.
        with torch.device("cpu" if "regnet" in name else "meta"):
            model = getattr(_models(), name)(**options)
        return model.to("meta"), called(images(real_size))

    return Row(f"tv-{name.replace('_', '-')}", family, "torchvision", small, real)


def _resnet(tv: Any, block: str = "BasicBlock", **options: Any) -> nn.Module:
    return tv.ResNet(getattr(tv.resnet, block), [1, 1, 1, 1], num_classes=10, **options)


def _convnext(tv: Any) -> nn.Module:
    settings = [tv.convnext.CNBlockConfig(a, b, 1) for a, b in ((12, 20), (20, 28), (28, None))]
    return tv.ConvNeXt(settings, 0.1, num_classes=10)


def _swin(tv: Any, version: str = "") -> nn.Module:
    kind = tv.swin_transformer
    block = kind.SwinTransformerBlockV2 if version else kind.SwinTransformerBlock
    merging = kind.PatchMergingV2 if version else kind.PatchMerging
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10, block=block, downsample_layer=merging)


def _mobilenet_v3(tv: Any) -> nn.Module:
    config = tv.mobilenetv3.InvertedResidualConfig
    setting = [
        config(8, 3, 8, 8, True, "RE", 2, 1, 1.0),
        config(8, 3, 20, 12, False, "RE", 1, 1, 1.0),
        config(12, 5, 24, 12, True, "HS", 1, 1, 1.0),
    ]
    return tv.MobileNetV3(setting, 40, num_classes=10)


def _efficientnet(tv: Any, *, fused: bool = False) -> nn.Module:
    config = tv.efficientnet.MBConvConfig
    setting = [config(1, 3, 1, 16, 8, 1), config(4, 3, 2, 8, 12, 2), config(4, 5, 1, 12, 20, 1)]
    if fused:
        setting[0] = tv.efficientnet.FusedMBConvConfig(2, 3, 1, 16, 8, 1)
    return tv.EfficientNet(setting, dropout=0.2, last_channel=40, num_classes=10)


def _regnet(tv: Any, *, se: bool) -> nn.Module:
    parameters = tv.regnet.BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=4, se_ratio=0.25 if se else None
    )
    return tv.RegNet(parameters, num_classes=10, stem_width=8)


def _vgg(tv: Any) -> nn.Module:
    features = tv.vgg.make_layers([8, "M", 12, "M", 16, 16, "M"], batch_norm=True)
    model = tv.VGG(features, num_classes=10)
    # The hidden layers of the classifier have 4096 units each whatever the features: smaller ones take their place.
    model.classifier = nn.Sequential(
        nn.Linear(16 * 7 * 7, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 20), nn.ReLU(True), nn.Linear(20, 10)
    )
    return model


def _maxvit(tv: Any) -> nn.Module:
    return tv.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[8, 12], block_layers=[1, 1],
        head_dim=4, stochastic_depth_prob=0.1, num_classes=10,
    )  # fmt: skip


def _segmentation(name: str, tiny: Callable[[Any], nn.Module] | None = None) -> Row:
    def real(size: int = 224) -> Built:
        model = getattr(_models().segmentation, name)(weights=None, weights_backbone=None, num_classes=5)
        return model, called(images(size))

    def small() -> Built:
        return (tiny(_models()), called(images(32))) if tiny else real(64)

    return Row(f"tv-{name.replace('_', '-')}", "segmentation", "torchvision", small, real)


def _fcn(tv: Any) -> nn.Module:
    backbone = _resnet(tv, "Bottleneck", width_per_group=16, replace_stride_with_dilation=[False, True, True])
    return tv.segmentation.fcn._fcn_resnet(backbone, num_classes=5, aux=None)


def _video(name: str, block: str, stem: str) -> Row:
    def tiny() -> Built:
        kind = _models().video.resnet
        conv = getattr(kind, block)
        model = kind.VideoResNet(kind.BasicBlock, [conv] * 4, [1, 1, 1, 1], getattr(kind, stem), num_classes=10)
        return model, called(torch.randn(2, 3, 4, 16, 16))

    def real() -> Built:
        return getattr(_models().video, name)(), called(torch.randn(2, 3, 8, 112, 112))

    return Row(f"tv-{name.replace('_', '-')}", "video", "torchvision", tiny, real)


def _mvit() -> Row:
    def tiny() -> Built:
        config = _models().video.mvit.MSBlockConfig
        blocks = [
            config(1, 12, 12, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
            config(2, 12, 24, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        ]
        model = _models().video.mvit.MViT((16, 16), 4, blocks, residual_pool=True, residual_with_cls_embed=False,
                                          rel_pos_embed=True, proj_after_attn=True, num_classes=10)  # fmt: skip
        return model, called(torch.randn(2, 3, 4, 16, 16))

    def real() -> Built:
        return _models().video.mvit_v2_s(), called(torch.randn(1, 3, 16, 224, 224))

    return Row("tv-mvit-v2", "MViT", "torchvision", tiny, real)


def _alexnet() -> Row:
    def real() -> Built:
        return _models().alexnet(), called(images(224))

    def tiny() -> Built:
        model = _models().alexnet(num_classes=10)
        model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 16), nn.ReLU(True), nn.Linear(16, 10))
        return model, called(images(64))

    return Row("tv-alexnet", "plain CNN", "torchvision", tiny, real)


TORCHVISION = (
    _alexnet(),
    _row("plain CNN", "vgg11_bn", _vgg),
    _row("plain CNN", "squeezenet1_0", size=48),
    _row("residual CNN", "resnet18", _resnet),
    _row("residual CNN", "resnet50", partial(_resnet, block="Bottleneck", width_per_group=16)),
    _row("residual CNN", "resnext50_32x4d", partial(_resnet, block="Bottleneck", groups=4, width_per_group=16)),
    _row("residual CNN", "wide_resnet50_2", partial(_resnet, block="Bottleneck", width_per_group=32)),
    _row("DenseNet", "densenet121", lambda tv: tv.DenseNet(8, (2, 3, 2), 16, bn_size=2, num_classes=10), size=32),
    _row("Inception", "googlenet", size=48, init_weights=False, aux_logits=False),
    _row("Inception", "inception_v3", size=80, real_size=299, init_weights=False, aux_logits=False),
    _row("MobileNet", "mobilenet_v2", lambda tv: tv.MobileNetV2(10, width_mult=0.25), size=64),
    _row("MobileNet", "mobilenet_v3_large", _mobilenet_v3),
    _row("MobileNet", "mobilenet_v3_small", size=64),
    _row("MobileNet", "mnasnet1_0", lambda tv: tv.MNASNet(0.25, num_classes=10), size=64),
    _row("EfficientNet", "efficientnet_b0", _efficientnet),
    _row("EfficientNet", "efficientnet_v2_s", partial(_efficientnet, fused=True), real_size=384),
    _row("RegNet", "regnet_x_400mf", partial(_regnet, se=False)),
    _row("RegNet", "regnet_y_400mf", partial(_regnet, se=True)),
    _row(
        "ShuffleNet", "shufflenet_v2_x1_0", lambda tv: tv.ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 40], num_classes=10)
    ),
    _row("ConvNeXt", "convnext_tiny", _convnext, real_size=224),
    _row("ViT", "vit_b_16", lambda tv: tv.VisionTransformer(16, 4, 2, 4, 24, 40, num_classes=10), size=16),
    _row("Swin", "swin_t", _swin),
    _row("Swin", "swin_v2_t", partial(_swin, version="2"), real_size=256),
    _row("MaxViT", "maxvit_t", _maxvit),
    _segmentation("lraspp_mobilenet_v3_large"),
    _segmentation("deeplabv3_mobilenet_v3_large"),
    _segmentation("fcn_resnet50", _fcn),
    _video("r3d_18", "Conv3DSimple", "BasicStem"),
    _video("r2plus1d_18", "Conv2Plus1D", "R2Plus1dStem"),
    _mvit(),
)
