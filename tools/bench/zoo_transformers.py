"""transformers architectures of the sweep, in tiny configurations of two layers."""

from planish.tools.bench.zoo import ZooEntry
from planish.tools.bench.zoo_text import DECODERS, ENCODERS, PAIRS
from planish.tools.bench.zoo_tiny import ENCODER, PAIR, PICTURE, Tiny

_SOUND = (
    Tiny(
        name="whisper-encoder",
        model="WhisperForAudioClassification",
        options={
            **PAIR,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 16,
        },
        inputs="spectrum",
    ),
    Tiny(
        name="wav2vec2",
        model="Wav2Vec2Model",
        options={
            **ENCODER,
            "conv_dim": (16, 16),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        inputs="wave",
    ),
    Tiny(
        name="hubert",
        model="HubertModel",
        options={
            **ENCODER,
            "conv_dim": (16, 16),
            "conv_stride": (5, 4),
            "conv_kernel": (10, 3),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        inputs="wave",
    ),
)
_PICTURES = (
    Tiny(
        name="vit",
        model="ViTForImageClassification",
        options=PICTURE,
        inputs="pixels",
        dynamic=True,
    ),
    Tiny(
        name="vit-eager",
        model="ViTModel",
        options=PICTURE,
        inputs="pixels",
        dynamic=True,
        eager=True,
    ),
    Tiny(name="deit", model="DeiTModel", options=PICTURE, inputs="pixels", dynamic=True),
    Tiny(
        name="beit",
        model="BeitModel",
        options={**PICTURE, "use_relative_position_bias": True},
        inputs="pixels",
    ),
    Tiny(name="dinov2", model="Dinov2Model", options=PICTURE, inputs="pixels", dynamic=True),
    Tiny(
        name="clip",
        model="CLIPModel",
        options={
            "text_config": {**ENCODER, "eos_token_id": 2},
            "vision_config": PICTURE,
            "projection_dim": 16,
        },
        inputs="clip",
        dynamic=True,
    ),
    Tiny(
        name="siglip-vision",
        model="SiglipVisionModel",
        options=PICTURE,
        inputs="pixels",
        dynamic=True,
    ),
    Tiny(
        name="swin",
        model="SwinModel",
        options={
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        inputs="pixels",
    ),
    Tiny(
        name="segformer",
        model="SegformerForSemanticSegmentation",
        options={
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [4, 2],
            "hidden_sizes": [16, 32],
            "num_attention_heads": [1, 2],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        inputs="large pixels",
        dynamic=True,
    ),
    Tiny(
        name="convnext",
        model="ConvNextModel",
        options={"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
        inputs="pixels",
        dynamic=True,
    ),
    Tiny(
        name="mobilevit",
        model="MobileViTModel",
        options={
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 64],
            "num_attention_heads": 4,
        },
        inputs="large pixels",
    ),
    Tiny(
        name="resnet",
        model="ResNetForImageClassification",
        options={"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        inputs="pixels",
        dynamic=True,
    ),
)


def entries() -> tuple[ZooEntry, ...]:
    """The transformers family."""
    groups = (ENCODERS, DECODERS, PAIRS, _SOUND, _PICTURES)
    return tuple(tiny.entry() for group in groups for tiny in group)
