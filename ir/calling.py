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


@dataclass(frozen=True)
class Call:
    """One call of a model, with keyword arguments in the order of ``forward``.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        parameters: the names of all of them, positional first; empty where unknown.
        defaults: parameters that were not passed -> their defaults.
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
        if name not in bound.arguments and parameter.default is not inspect.Parameter.empty
    }
    ordered = {name: kwargs[name] for name in order}
    return Call(tuple(args), ordered, (*positional[: len(args)], *order), defaults)


def input_names(spec: pytree.TreeSpec, parameters: tuple[str, ...]) -> tuple[str, ...]:
    """A name for every input leaf: the parameter's own, with a path where it is nested."""
    skeleton = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    args, kwargs = skeleton
    names: list[str] = []
    for position, value in enumerate(args):
        name = parameters[position] if position < len(parameters) else f"input_{position}"
        names.extend(_leaf_names(name, value))
    for name, value in kwargs.items():
        names.extend(_leaf_names(name, value))
    return _unique(names, taken=())


def output_names(spec: pytree.TreeSpec, taken: tuple[str, ...]) -> tuple[str, ...]:
    """A name for every output leaf, from the pytree; ``output_0`` where it has none."""
    skeleton = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = pytree.tree_flatten_with_path(skeleton)[0]
    names = []
    for position, (path, _) in enumerate(paths):
        text = _path_text(path)
        named = bool(re.match(r"[A-Za-z_]", text))
        names.append(text if named else f"output_{text or position}")
    return _unique(names, taken=taken)


def _leaf_names(prefix: str, value: object) -> list[str]:
    paths = pytree.tree_flatten_with_path(value)[0]
    return [f"{prefix}_{text}" if (text := _path_text(p)) else prefix for p, _ in paths]


def _path_text(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
    return re.sub(r"\W+", "_", "_".join(parts))


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
