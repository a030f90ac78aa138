"""Dynamic dimensions: the user's names for torch's symbols, legal ranges, samples of size 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import _DimHint, _tree_map_with_path
from torch.utils import _pytree as pytree

from planish.ir.calling import Call
from planish.ir.errors import UsageError

DimSpec = dict[tuple[int, int], str | None]  # (input leaf, axis) -> the user's name, if it has one


def enlarge_singletons(call: Call, dynamic_shapes: Any) -> tuple[Call, DimSpec]:  # noqa: ANN401
    """Repeat samples of size 1 along dynamic dimensions, so that tracing keeps them dynamic.

    All dimensions that share a name grow together.

    Returns:
        The call to trace with, and which leaf axes are dynamic.
    """
    if dynamic_shapes is None:
        return call, {}
    dims, markers = _dynamic_axes(call, dynamic_shapes)
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    named_one = {dims[key] for key in dims if leaves[key[0]].shape[key[1]] == 1 and dims[key]}
    for key, name in dims.items():
        leaf, axis = key
        tensor = leaves[leaf]
        if tensor.shape[axis] != 1 or (name is not None and name not in named_one):
            continue
        largest = getattr(markers[key], "max", None)
        if isinstance(largest, int) and largest < 2:
            raise UsageError(
                f"dimension {name or axis} is declared dynamic with largest size {largest}",
                hint="leave it static, or allow a size of 2 or more",
            )
        smallest = getattr(markers[key], "min", None)
        count = max(2, smallest) if isinstance(smallest, int) else 2
        leaves[leaf] = tensor.repeat_interleave(count, dim=axis)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return replace(call, args=args, kwargs=kwargs), dims


def _dynamic_axes(
    call: Call,
    dynamic_shapes: Any,  # noqa: ANN401
) -> tuple[DimSpec, dict[tuple[int, int], Any]]:
    """Which axes of which leaves the caller declared dynamic."""
    positions: dict[int, int] = {}
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    for position, leaf in enumerate(leaves):
        positions.setdefault(id(leaf), position)
    dims: DimSpec = {}
    markers: dict[tuple[int, int], Any] = {}

    def visit(path: Any, leaf: object, spec: Any) -> None:  # noqa: ANN401
        if not isinstance(leaf, Tensor) or spec is None:
            return
        entries = spec.items() if isinstance(spec, dict) else enumerate(spec)
        for axis, marker in entries:
            if isinstance(marker, Dim) or _is_dynamic_hint(marker):
                if not -leaf.dim() <= axis < leaf.dim():
                    raise UsageError(
                        f"dynamic_shapes names axis {axis} of an input with {leaf.dim()} axes",
                        hint="axes count from 0",
                    )
                key = (positions[id(leaf)], axis % leaf.dim())
                dims[key] = getattr(marker, "__name__", None)
                markers[key] = marker

    combined = _combine_args_by_name(call)
    shapes = dynamic_shapes
    if not isinstance(shapes, dict):
        shapes = dict(zip(combined, shapes, strict=False))
    try:
        _tree_map_with_path(visit, combined, shapes, tree_name="inputs")
    except UsageError:
        raise
    except Exception as error:  # torch raises its own UserError with the mismatching path
        raise UsageError(
            f"dynamic_shapes does not fit the inputs: {str(error).splitlines()[0]}",
            hint="give one entry per input (" + ", ".join(combined) + "), as torch.export does",
        ) from None
    return dims, markers


def _combine_args_by_name(call: Call) -> dict[str, Any]:
    names = call.parameters[: len(call.args)]
    return {**dict(zip(names, call.args, strict=True)), **call.kwargs}


def _is_dynamic_hint(marker: object) -> bool:
    return isinstance(marker, _DimHint) and marker.type.name in ("DYNAMIC", "AUTO")


def named_symbols(exported: ExportedProgram, dims: DimSpec, call: Call) -> dict[str, str]:
    """Torch's symbol -> the user's name, read off the traced inputs."""
    from planish.ir.calling import input_names

    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"]
    count = pytree.tree_structure((call.args, call.kwargs)).num_leaves
    values = values[len(values) - count :]
    names = input_names(exported.call_spec.in_spec, call.parameters)
    symbols: dict[str, str] = {}
    for (leaf, axis), name in dims.items():
        size = values[leaf].shape[axis] if isinstance(values[leaf], Tensor) else None
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            symbols.setdefault(str(size.node.expr), name or f"{names[leaf]}_dim_{axis}")
    return symbols


def legal_ranges(exported: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Torch's symbol -> (smallest, largest) legal size; None for no upper bound."""
    ranges: dict[str, tuple[int, int | None]] = {}
    for symbol, bounds in exported.range_constraints.items():
        lower = int(bounds.lower) if bounds.lower.is_finite else 0
        upper = int(bounds.upper) if bounds.upper.is_Integer else None
        ranges[str(symbol)] = (max(lower, 0), upper)
    return ranges
