"""torchvision architectures of the sweep, in their smallest form with every kind of layer."""

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn
from torch.export import Dim

from planish.tools.bench.torchvision_shim import import_torchvision
from planish.tools.bench.zoo import DynamicShapes, ZooEntry, one_tensor, seeded

_BATCH = {0: Dim("batch", min=1, max=16)}
# Fully convolutional networks that halve five times: both sides are multiples of 32.
_BATCH_AND_SIDES = {
    0: Dim("batch", min=1, max=16),
    2: 32 * Dim("rows", min=1, max=8),
    3: 32 * Dim("columns", min=1, max=8),
}


# Name, options, shape of the sample, dynamic dimensions.
_PLAIN: tuple[tuple[str, dict[str, Any], tuple[int, ...], Mapping[int, Any] | None], ...] = (
    ("resnet18", {}, (2, 3, 64, 64), _BATCH),
    ("resnet50", {}, (1, 3, 64, 64), None),
    ("resnext50_32x4d", {}, (1, 3, 64, 64), None),
    ("mobilenet_v2", {}, (2, 3, 64, 64), _BATCH_AND_SIDES),
    ("mobilenet_v3_small", {}, (2, 3, 64, 64), _BATCH),
    ("mobilenet_v3_large", {}, (1, 3, 64, 64), None),
    ("shufflenet_v2_x0_5", {}, (2, 3, 64, 64), _BATCH),
    ("shufflenet_v2_x1_0", {}, (1, 3, 64, 64), None),
    ("squeezenet1_0", {}, (1, 3, 64, 64), None),
    ("squeezenet1_1", {}, (2, 3, 64, 64), _BATCH),
    ("densenet121", {}, (1, 3, 64, 64), None),
    ("googlenet", {"aux_logits": False, "init_weights": False}, (2, 3, 64, 64), _BATCH),
    ("inception_v3", {"aux_logits": False, "init_weights": False}, (1, 3, 96, 96), None),
    ("efficientnet_b0", {}, (2, 3, 64, 64), _BATCH),
    ("regnet_x_400mf", {}, (1, 3, 64, 64), None),
    ("regnet_y_400mf", {}, (2, 3, 64, 64), _BATCH),
    ("mnasnet0_5", {}, (2, 3, 64, 64), _BATCH),
    ("segmentation.fcn_resnet50", {"weights_backbone": None}, (1, 3, 64, 64), None),
    (
        "segmentation.deeplabv3_mobilenet_v3_large",
        {"weights_backbone": None},
        (2, 3, 64, 64),
        _BATCH,
    ),
    (
        "segmentation.lraspp_mobilenet_v3_large",
        {"weights_backbone": None},
        (1, 3, 64, 64),
        None,
    ),
    ("video.r3d_18", {}, (1, 3, 4, 32, 32), None),
    ("video.mc3_18", {}, (1, 3, 4, 32, 32), None),
    ("video.r2plus1d_18", {}, (1, 3, 4, 32, 32), None),
)


def _models() -> ModuleType:
    import_torchvision()
    import torchvision.models

    models: ModuleType = torchvision.models
    return models


def _plain(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A constructor of torchvision.models (``segmentation.`` and ``video.`` names too)."""
    models = _models()
    if name.startswith(("segmentation.", "video.")):
        holder, name = name.split(".")
        models = getattr(models, holder)
    constructor: Callable[..., nn.Module] = getattr(models, name)
    return constructor(weights=None, **options)


def _with_small_head(name: str, features: int) -> nn.Module:
    """VGG and AlexNet with a classifier of 64 units; their own of 4096 is 90% of their size."""
    model = _plain(name, {})
    model.classifier = nn.Sequential(
        nn.Linear(features, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)
    )
    return model


def _vit() -> nn.Module:
    model: nn.Module = _models().VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
    )
    return model


def _swin(version: int) -> nn.Module:
    swin = _models().swin_transformer
    extra = {}
    if version == 2:
        extra = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    model: nn.Module = swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=[4, 4],
        **extra,
    )
    return model


def _convnext() -> nn.Module:
    convnext = _models().convnext
    config = convnext.CNBlockConfig
    settings = [config(16, 32, 2), config(32, 64, 2), config(64, None, 1)]
    model: nn.Module = convnext.ConvNeXt(block_setting=settings, num_classes=10)
    return model


def _maxvit() -> nn.Module:
    model: nn.Module = _models().maxvit.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )
    return model


def _entry(
    name: str,
    constructor: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dims: Mapping[int, Any] | None = None,
    argument: str = "x",
) -> ZooEntry:
    shapes: DynamicShapes | None = {argument: dims} if dims else None
    return ZooEntry(
        name=f"torchvision/{name}",
        family="torchvision",
        build=seeded(constructor),
        inputs=one_tensor(*shape),
        dynamic_shapes=shapes,
    )


def entries() -> tuple[ZooEntry, ...]:
    """The torchvision family."""
    special: list[ZooEntry] = [
        _entry("vgg11_bn", partial(_with_small_head, "vgg11_bn", 512 * 49), (1, 3, 64, 64)),
        _entry("alexnet", partial(_with_small_head, "alexnet", 256 * 36), (2, 3, 64, 64), _BATCH),
        _entry("vit", _vit, (2, 3, 64, 64), _BATCH),
        _entry("swin", partial(_swin, 1), (1, 3, 64, 64)),
        _entry("swin_v2", partial(_swin, 2), (2, 3, 64, 64), _BATCH),
        _entry("convnext", _convnext, (2, 3, 64, 64), _BATCH),
        _entry("maxvit", _maxvit, (1, 3, 64, 64)),
    ]
    plain = [
        _entry(name, partial(_plain, name, options), shape, dims)
        for name, options, shape, dims in _PLAIN
    ]
    return (*plain, *special)
