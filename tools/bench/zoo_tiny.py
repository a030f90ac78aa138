"""How a tiny transformers model of the sweep is described, built and fed.

The model class is named by a string, so that transformers is imported when an entry is built. Text
models get masks with padding; about half of the entries have dynamic batch and sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

from planish.tools.bench.real_nets import require
from planish.tools.bench.zoo import (
    DynamicShapes,
    Inputs,
    ZooEntry,
    integers,
    normal,
    padding_mask,
    seeded,
)

VOCABULARY = 99
BATCH, LENGTH = 2, 12


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One tiny configuration.

    Attributes:
        name: of the entry, after ``transformers/``.
        model: class name of the model.
        options: of the configuration.
        inputs: name in ``_INPUTS``.
        dynamic: whether batch (and sequence, for text) are dynamic.
        eager: attention written out instead of ``scaled_dot_product_attention``.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = "text"
    dynamic: bool = False
    eager: bool = False

    def entry(self) -> ZooEntry:
        """The entry of the sweep."""
        make, shapes = _INPUTS[self.inputs]
        return ZooEntry(
            name=f"transformers/{self.name}",
            family="transformers",
            build=seeded(self._construct),
            inputs=make,
            dynamic_shapes=shapes if self.dynamic else None,
        )

    def _construct(self) -> nn.Module:
        transformers = require("transformers")
        constructor = getattr(transformers, self.model)
        config = constructor.config_class(**self.options)
        implementation = "eager" if self.eager else "sdpa"
        if not (self.eager or getattr(constructor, "_supports_sdpa", False)):
            implementation = "eager"  # the only one that this network has
        model: nn.Module = constructor._from_config(config, attn_implementation=implementation)
        return model


def _text(batch: int = BATCH, length: int = LENGTH) -> dict[str, Tensor]:
    # Number 0 and 1 are padding in most vocabularies; the tokens proper begin above them.
    return {
        "input_ids": integers(VOCABULARY - 4, batch, length) + 4,
        "attention_mask": padding_mask(batch, length),
    }


def _text_inputs() -> Inputs:
    return (), dict(_text())


def _cacheless_inputs() -> Inputs:
    return (), {**_text(), "use_cache": False}


def _ids_inputs() -> Inputs:
    return (integers(VOCABULARY - 4, BATCH, LENGTH) + 4,), {}


def _pair_inputs() -> Inputs:
    return (), {
        **_text(),
        "decoder_input_ids": integers(VOCABULARY - 4, BATCH, 7, seed=21) + 4,
        "use_cache": False,
    }


def _pixel_inputs() -> Inputs:
    return (), {"pixel_values": normal(BATCH, 3, 32, 32)}


def _large_pixel_inputs() -> Inputs:
    return (), {"pixel_values": normal(BATCH, 3, 64, 64)}


def _clip_inputs() -> Inputs:
    return (), {**_text(), "pixel_values": normal(BATCH, 3, 32, 32)}


def _wave_inputs() -> Inputs:
    return (), {"input_values": normal(BATCH, 800)}


def _spectrum_inputs() -> Inputs:
    return (), {"input_features": normal(BATCH, 16, 40)}


_B = Dim("batch", min=1, max=16)
_T = Dim("sequence", min=2, max=32)
_U = Dim("target", min=2, max=32)
_TEXT_DIMS: dict[str, Any] = {"input_ids": {0: _B, 1: _T}, "attention_mask": {0: _B, 1: _T}}
_PIXEL_DIMS: dict[str, Any] = {"pixel_values": {0: _B}}

_INPUTS: Mapping[str, tuple[Callable[[], Inputs], DynamicShapes]] = {
    "text": (_text_inputs, _TEXT_DIMS),
    "cacheless": (_cacheless_inputs, {**_TEXT_DIMS, "use_cache": None}),
    "ids": (_ids_inputs, {"input_ids": {0: _B, 1: _T}}),
    "pair": (_pair_inputs, {**_TEXT_DIMS, "decoder_input_ids": {0: _B, 1: _U}, "use_cache": None}),
    "pixels": (_pixel_inputs, _PIXEL_DIMS),
    "large pixels": (_large_pixel_inputs, _PIXEL_DIMS),
    "clip": (_clip_inputs, {**_TEXT_DIMS, **_PIXEL_DIMS}),
    "wave": (_wave_inputs, {"input_values": {0: _B}}),
    "spectrum": (_spectrum_inputs, {"input_features": {0: _B}}),
}

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DECODER = {**ENCODER, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}
PICTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "use_cache": False,
}
