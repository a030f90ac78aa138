"""Modules made of one expression, and tiny configurations of known architectures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.passes.base import Pass
from planish.passes.recipe import Recipe

BATCH, LENGTH = Dim("batch"), Dim("length")


class Unary(nn.Module):
    """``f(self, x)``, where ``self`` holds the tensors given by name."""

    def __init__(self, f: Callable[..., Any], **tensors: Tensor):
        super().__init__()
        self.f = f
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


class Ternary(Unary):
    """``f(self, q, k, v)``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:  # type: ignore[override]
        return self.f(self, q, k, v)


class Quaternary(Unary):
    """``f(self, q, k, v, m)``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Any:  # type: ignore[override]
        return self.f(self, q, k, v, m)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that are the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_a_value(pass_: Pass, text: str) -> None:
    """Assert that a pass is equal to its copy and survives being written as text and YAML."""
    assert pass_ == type(pass_)(**vars(pass_))
    recipe = Recipe.parse(text)
    assert recipe.passes == (pass_,)
    assert str(recipe) == text
    assert Recipe.from_yaml(recipe.to_yaml()).passes == (pass_,)


def _config(kind: str) -> tuple[Any, type[Any]]:
    import transformers as t

    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "attn_implementation": "eager",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "bert":
        return t.BertConfig(**sizes), t.BertModel
    if kind == "llama":
        return t.LlamaConfig(**sizes, num_key_value_heads=1), t.LlamaModel
    if kind == "vit":
        return t.ViTConfig(**sizes, image_size=8, patch_size=4), t.ViTModel
    if kind == "t5":
        own = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        return t.T5Config(vocab_size=50, **own, attn_implementation="eager"), t.T5EncoderModel
    if kind == "gpt2":
        own = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
        return t.GPT2Config(vocab_size=50, **own, attn_implementation="eager"), t.GPT2Model
    raise KeyError(kind)


def tiny(kind: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model of one layer, its keyword inputs and their dynamic shapes.

    Args:
        kind: "bert", "gpt2", "llama", "t5" or "vit".
    """
    torch.manual_seed(0)
    config, cls = _config(kind)
    model = cls(config).eval()
    if kind == "vit":
        return model, {"pixel_values": random(2, 3, 8, 8)}, {"pixel_values": {0: BATCH}}
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    ids = torch.randint(3, 50, (2, 7), generator=generator)
    shape = {0: BATCH, 1: Dim("length", max=64)}
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    dims: dict[str, Any] = {"input_ids": shape, "attention_mask": shape}
    if kind in ("gpt2", "llama"):
        inputs["use_cache"], dims["use_cache"] = False, None
    return model, inputs, dims
