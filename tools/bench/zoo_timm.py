"""timm architectures of the sweep: one small member of each of many families."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.export import Dim

from planish.tools.bench.torchvision_shim import import_timm
from planish.tools.bench.zoo import ZooEntry, one_tensor, seeded


@dataclass(frozen=True)
class _Variant:
    """A timm model: name, side of its square input, whether the batch is dynamic, options."""

    name: str
    side: int = 64
    dynamic: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> ZooEntry:
        batch = 2 if self.dynamic else 1
        return ZooEntry(
            name=f"timm/{self.name}",
            family="timm",
            build=seeded(_constructor(self.name, self.options)),
            inputs=one_tensor(batch, 3, self.side, self.side),
            dynamic_shapes=({0: Dim("batch", min=1, max=16)},) if self.dynamic else None,
        )


def _constructor(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def construct() -> nn.Module:
        model: nn.Module = import_timm().create_model(
            name, pretrained=False, num_classes=10, **options
        )
        return model

    return construct


_VARIANTS = (
    # convolutional
    _Variant("resnet10t", dynamic=True),
    _Variant("seresnext26t_32x4d"),
    _Variant("skresnet18"),
    _Variant("res2net50_14w_8s"),
    _Variant("resnest14d"),
    _Variant("nf_regnet_b0", dynamic=True),
    _Variant("mobilenetv4_conv_small_050", dynamic=True),
    _Variant("mixnet_s"),
    _Variant("ghostnet_050", dynamic=True),
    _Variant("lcnet_035", dynamic=True),
    _Variant("rexnet_100"),
    _Variant("repghostnet_050"),
    _Variant("repvgg_a0", dynamic=True),
    _Variant("ese_vovnet19b_slim_dw"),
    _Variant("dla46_c"),
    _Variant("hrnet_w18_small"),
    _Variant("cspresnet50"),
    _Variant("convnextv2_atto", dynamic=True),
    _Variant("starnet_s1"),
    _Variant("hgnetv2_b0"),
    # attention, mixing, hybrids
    _Variant("vit_tiny_patch16_224", dynamic=True, options={"img_size": 64, "depth": 2}),
    _Variant("deit_tiny_distilled_patch16_224", options={"img_size": 64, "depth": 2}),
    _Variant(
        "beit_base_patch16_224",
        options={"img_size": 64, "depth": 2, "embed_dim": 192, "num_heads": 3},
    ),
    _Variant("eva02_tiny_patch14_224", side=56, options={"img_size": 56, "depth": 2}),
    _Variant("cait_xxs24_224", options={"img_size": 64, "depth": 2}),
    _Variant("xcit_nano_12_p16_224", options={"img_size": 64, "depth": 2}),
    _Variant("mixer_s32_224", dynamic=True, options={"img_size": 64}),
    _Variant("resmlp_12_224", options={"img_size": 64}),
    _Variant("gmlp_ti16_224", options={"img_size": 64}),
    _Variant("convmixer_768_32"),
    _Variant(
        "swin_tiny_patch4_window7_224",
        side=56,
        options={"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (3, 6)},
    ),
    _Variant("mobilevit_xxs"),
    _Variant("mobilevitv2_050", dynamic=True),
    _Variant("edgenext_xx_small"),
    _Variant("efficientformer_l1", side=224),
    _Variant("efficientvit_b0"),
    _Variant("efficientvit_m0", side=224),
    _Variant("levit_128s", side=224),
    _Variant("poolformer_s12"),
    _Variant("pvt_v2_b0", dynamic=True),
    _Variant("coat_lite_tiny", options={"img_size": 64}),
    _Variant("repvit_m0_9"),
    _Variant("fastvit_t8"),
    _Variant("tiny_vit_5m_224", side=224),
    _Variant("focalnet_tiny_srf"),
    _Variant("visformer_tiny", options={"img_size": 64}),
)


def entries() -> tuple[ZooEntry, ...]:
    """The timm family."""
    return tuple(variant.entry() for variant in _VARIANTS)
