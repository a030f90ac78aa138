"""Example inputs: the forms a caller may pass, and what a model itself advertises."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from planish.ir.errors import UsageError
from planish.ir.program import Program
from planish.ir.tensortype import type_text

_BATCH, _LENGTH = 2, 16


@dataclass(frozen=True)
class Examples:
    """Example inputs and the dynamic shapes that go with them.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        dynamic_shapes: as ``torch.export`` takes it, or None.
        names: input -> axis -> dimension name, for axes that ``dynamic_shapes`` leaves to torch.
        origin: where they came from, for the report.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any = None
    names: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    origin: str = "given"


def normalize(example_inputs: object, dynamic_shapes: Any = None) -> Examples:  # noqa: ANN401
    """Read the forms of ``example_inputs``.

    Raises:
        UsageError: another form; says which there are.
    """
    if isinstance(example_inputs, Tensor):
        return Examples((example_inputs,), {}, dynamic_shapes)
    if isinstance(example_inputs, Mapping):
        return Examples((), dict(example_inputs), dynamic_shapes)
    if isinstance(example_inputs, tuple):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], tuple)
            and isinstance(example_inputs[1], dict)
        ):
            return Examples(example_inputs[0], example_inputs[1], dynamic_shapes)
        return Examples(example_inputs, {}, dynamic_shapes)
    raise UsageError(
        f"example_inputs is a {type(example_inputs).__name__}",
        hint="pass an args tuple (a bare tensor is one argument), a kwargs dict, or "
        "(args tuple, kwargs dict)",
    )


def advertised(model: nn.Module, seed: int = 0) -> Examples:
    """Example inputs from what the model says of itself (transformers, timm).

    Raises:
        UsageError: the model says nothing; says what to pass.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = _from_timm(model, generator) or _from_transformers(model, generator)
    if found is None:
        raise UsageError(
            f"{type(model).__name__} does not say what its inputs look like",
            hint=f"pass example_inputs: forward takes {inspect.signature(model.forward)}",
        )
    kwargs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in found.kwargs.items()}
    args = tuple(a.to(device) for a in found.args)
    return replace(found, args=args, kwargs=kwargs)


def name_dimensions(program: Program, names: Mapping[str, Mapping[int, str]]) -> None:
    """Give the program's symbols the names that examples know for them."""
    symbols = dict(program.signature.symbols)
    for node, public in zip(program.placeholders, program.signature.tensor_names, strict=True):
        for axis, name in names.get(public, {}).items():
            size = node.meta["val"].shape[axis]
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols[str(size.node.expr)] = name
    program.signature = replace(program.signature, symbols=symbols)


def narrowed(program: Program, dynamic_shapes: Any) -> Iterator[str]:  # noqa: ANN401
    """Sentences on what tracing made of dimensions that were left to torch (``Dim.AUTO``).

    Torch fixes such a dimension, or bounds it, where the model's own code leaves no choice, and
    says nothing. A deployed file would not say so either, and be wrong outside of the bounds.
    """
    hint = type(Dim.AUTO)
    leaves = [v for v in pytree.tree_leaves(dynamic_shapes) if isinstance(v, (hint, Dim))]
    if not any(isinstance(v, hint) and v == Dim.AUTO for v in leaves):
        return
    declared = sum(1 for v in leaves if v != Dim.STATIC)
    types = {
        name: node.meta["val"]
        for name, node in zip(program.signature.tensor_names, program.placeholders, strict=True)
        if isinstance(node.meta.get("val"), Tensor)
    }
    sizes: list[Any] = [size for t in types.values() for size in t.shape]
    moving = sum(isinstance(s, torch.SymInt) and not s.node.expr.is_Integer for s in sizes)
    if moving < declared:
        symbols = program.signature.symbols
        shown = ", ".join(f"{name}: {type_text(t, symbols)}" for name, t in types.items())
        yield (
            f"{declared - moving} of {declared} dynamic dimensions were fixed by the model's own "
            f"code; its inputs are {shown}"
        )
    for symbol, (low, high) in program.signature.ranges.items():
        if high is not None:
            name = program.signature.symbols.get(symbol, symbol)
            yield f"dimension {name} may be {low} to {high}: the model does something else beyond"


def _from_timm(model: nn.Module, generator: torch.Generator) -> Examples | None:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None:
        return None
    image = torch.randn(_BATCH, *size, generator=generator)
    parameter = next(iter(inspect.signature(model.forward).parameters))
    names = {parameter: {0: "batch"}}
    return Examples((image,), {}, ({0: Dim.AUTO},), names, "timm default_cfg")


def _from_transformers(model: nn.Module, generator: torch.Generator) -> Examples | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "dummy_inputs"):
        return None
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        kwargs, names = _images(config, generator)
    elif main == "input_ids":
        kwargs, names = _tokens(config, accepted, generator)
    elif main in (dummies := dict(cast("Mapping[str, Tensor]", model.dummy_inputs))):
        return Examples((), dummies, origin="transformers dummy_inputs")
    else:
        return None
    dynamic: dict[str, Any] = {n: dict.fromkeys(axes, Dim.AUTO) for n, axes in names.items()}
    if "use_cache" in accepted and getattr(config, "is_decoder", True):
        kwargs["use_cache"] = False  # a cache is state; a program of one forward pass has none
        dynamic["use_cache"] = None
    return Examples((), kwargs, dynamic, names, "transformers configuration")


def _images(config: Any, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3)
    image = torch.randn(_BATCH, channels, height, width, generator=generator)
    return {"pixel_values": image}, {"pixel_values": {0: "batch"}}


def _tokens(
    config: Any,  # noqa: ANN401 - a transformers configuration
    accepted: Mapping[str, object],
    generator: torch.Generator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    vocabulary = int(getattr(config, "vocab_size", 100))
    low = min(5, vocabulary - 1)  # the first few are padding and other special tokens
    shape = (_BATCH, _LENGTH)
    ids = torch.randint(low, vocabulary, shape, generator=generator)
    kwargs: dict[str, Any] = {"input_ids": ids}
    names = {"input_ids": {0: "batch", 1: "sequence"}}
    if "attention_mask" in accepted:
        mask = torch.ones(shape, dtype=torch.int64)
        mask[-1, -_LENGTH // 4 :] = 0  # a padded row, so that a lost mask is noticed
        kwargs["attention_mask"] = mask
        names["attention_mask"] = names["input_ids"]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        kwargs["decoder_input_ids"] = ids.clone()
        names["decoder_input_ids"] = {0: "batch", 1: "decoder_sequence"}
    return kwargs, names
