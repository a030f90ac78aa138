"""Calls and their names: which argument is which, and what each leaf of a pytree is called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from planish.ir.errors import UsageError
from planish.ir.trees import leaf_paths


@dataclass(frozen=True)
class Call:
    """One call of a model, with keyword arguments in the order of ``forward``.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        parameters: the names of all of them, positional first; empty where unknown.
        defaults: parameters that have a default -> that default.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[str, ...]
    defaults: Mapping[str, object]


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Match a call against ``forward``.

    Raises:
        UsageError: the call does not fit the signature of ``forward``.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}",
            hint="pass example_inputs as an args tuple, a kwargs dict, or (args, kwargs)",
        ) from None
    positional: list[str] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            positional.extend(f"{name}_{i}" for i in range(len(value)))
        elif name not in kwargs and kind is not inspect.Parameter.VAR_KEYWORD:
            positional.append(name)
    order = [n for n in signature.parameters if n in kwargs]
    order += [n for n in kwargs if n not in order]
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    ordered = {name: kwargs[name] for name in order}
    return Call(tuple(args), ordered, (*positional[: len(args)], *order), defaults)


def input_names(spec: pytree.TreeSpec, parameters: tuple[str, ...]) -> tuple[str, ...]:
    """A name for every input leaf: the parameter's own, with a path where it is nested."""
    args, kwargs = spec.children()
    names: list[str] = []
    for position, child in enumerate(args.children()):
        name = parameters[position] if position < len(parameters) else f"input_{position}"
        names.extend(_leaf_names(name, child))
    for name, child in zip(kwargs.context, kwargs.children(), strict=True):
        names.extend(_leaf_names(name, child))
    return _unique(names, taken=())


def output_names(spec: pytree.TreeSpec, taken: tuple[str, ...]) -> tuple[str, ...]:
    """A name for every output leaf, from the pytree; ``output_0`` where it has none."""
    names = []
    for position, path in enumerate(leaf_paths(spec)):
        text = _path_text(path)
        named = bool(re.match(r"[A-Za-z_]", text))
        names.append(text if named else f"output_{text or position}")
    return _unique(names, taken=taken)


def _leaf_names(prefix: str, spec: pytree.TreeSpec) -> list[str]:
    return [_path_text((prefix, *path)) for path in leaf_paths(spec)]


def _path_text(path: tuple[str, ...]) -> str:
    return re.sub(r"\W+", "_", "_".join(path))


def _unique(names: list[str], taken: tuple[str, ...]) -> tuple[str, ...]:
    """Make names distinct from each other and from ``taken`` (ONNX has one name space)."""
    used = set(taken)
    result = []
    for name in names:
        candidate, count = name, 0
        while candidate in used:
            count += 1
            candidate = f"{name}_out" if count == 1 and name in taken else f"{name}_{count}"
        used.add(candidate)
        result.append(candidate)
    return tuple(result)
