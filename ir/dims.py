"""Dynamic dimensions: the user's names for torch's symbols, legal ranges, samples of size 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import AdditionalInputs, Dim, ExportedProgram, ShapesCollection
from torch.export.dynamic_shapes import _combine_args, _DimHint, _tree_map_with_path
from torch.utils import _pytree as pytree

from planish.ir.calling import Call, input_names
from planish.ir.errors import UsageError

_REACH = 64  # how far above its smallest legal size a dimension is looked at


@dataclass(frozen=True)
class Axis:
    """One axis that the caller declared dynamic.

    Attributes:
        leaf: position among the leaves of the call.
        axis: counted from 0.
        name: the user's name, if it is a plain named dimension.
        root: axes of one root change together: a name, or the place of an unnamed one.
        size: size of this axis for a size of the root (``2*half``).
        smallest: of the root.
        largest: of the root, or None.
        hinted: declared by a hint, without a name.
        optional: whether torch may decide that it is static after all.
    """

    leaf: int
    axis: int
    name: str | None
    root: str
    size: Callable[[int], int]
    smallest: int
    largest: int | None
    hinted: bool = False
    optional: bool = False


def explicit_shapes(model: nn.Module, call: Call, dynamic_shapes: Any) -> Any:  # noqa: ANN401
    """``dynamic_shapes`` as plain containers, whatever form the caller chose.

    Torch's collections find tensors by identity, and samples may be replaced before the trace.

    Raises:
        UsageError: a collection does not fit the inputs.
    """
    if not isinstance(dynamic_shapes, (ShapesCollection, AdditionalInputs)):
        return dynamic_shapes
    try:
        return dynamic_shapes.dynamic_shapes(  # type: ignore[no-untyped-call]
            model, call.args, call.kwargs
        )
    except Exception as error:  # torch raises AssertionError, ValueError, ...
        raise UsageError(
            f"dynamic_shapes does not fit the inputs: {_first_line(error)}",
            hint="name only tensors that are among the example inputs",
        ) from error


def dynamic_axes(model: nn.Module, call: Call, dynamic_shapes: Any) -> list[Axis]:  # noqa: ANN401
    """The axes that the caller declared dynamic.

    Raises:
        UsageError: the declaration does not fit the inputs.
    """
    if not dynamic_shapes:
        return []
    inputs: Any = _combine_args(model, call.args, call.kwargs)
    shapes = dynamic_shapes
    if isinstance(shapes, (tuple, list)):
        inputs, shapes = list(inputs.values()), list(shapes)
    elif isinstance(shapes, dict) and (unknown := [k for k in shapes if k not in inputs]):
        raise UsageError(
            f"dynamic_shapes names {unknown[0]!r}, which is not among the inputs",
            hint="the inputs are " + ", ".join(map(str, inputs)),
        )
    axes: list[Axis] = []
    count = 0

    def visit(_path: Any, leaf: object, spec: object) -> None:  # noqa: ANN401
        nonlocal count
        position, count = count, count + 1
        if isinstance(leaf, Tensor) and spec is not None:
            axes.extend(_axes_of(position, leaf, spec))

    try:
        _tree_map_with_path(visit, inputs, shapes, tree_name="inputs")
    except UsageError:
        raise
    except Exception as error:  # torch raises its own UserError with the mismatching path
        names = ", ".join(map(str, _combine_args(model, call.args, call.kwargs)))
        raise UsageError(
            f"dynamic_shapes does not fit the inputs: {_first_line(error)}",
            hint=f"give one entry per input ({names}), as torch.export does",
        ) from None
    _check_sizes(call, axes)
    return axes


def _check_sizes(call: Call, axes: list[Axis]) -> None:
    """Refuse a sample outside of the range that its dimension is declared to have.

    Raises:
        UsageError: names the dimension.
    """
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    for a in axes:
        size, smallest = leaves[a.leaf].shape[a.axis], a.size(a.smallest)
        largest = a.size(a.largest) if a.largest is not None else None
        if size < smallest or (largest is not None and size > largest):
            raise UsageError(
                f"an example input has size {size} in dimension {a.name or a.axis}, which is "
                f"declared to be from {smallest} to {largest or 'any size'}",
                hint="pass an example input within the range, or widen it",
            )


def _axes_of(position: int, tensor: Tensor, spec: object) -> list[Axis]:
    if isinstance(spec, dict):
        entries = list(spec.items())
    elif isinstance(spec, (tuple, list)):
        if len(spec) != tensor.dim():
            raise UsageError(
                f"dynamic_shapes has {len(spec)} entries for an input with {tensor.dim()} axes",
                hint="give one entry per axis, or a dict from axis to dimension",
            )
        entries = list(enumerate(spec))
    else:
        raise UsageError(
            f"dynamic_shapes describes an input by {spec!r}",
            hint="describe it by None, a dict from axis to dimension, or one entry per axis",
        )
    axes = []
    for axis, marker in entries:
        if not isinstance(axis, int) or not 0 <= axis < tensor.dim():
            raise UsageError(
                f"dynamic_shapes names axis {axis!r} of an input with {tensor.dim()} axes",
                hint="axes are numbers and count from 0",
            )
        if isinstance(marker, str):
            raise UsageError(
                f"dynamic_shapes names a dimension by the string {marker!r}",
                hint=f"write torch.export.Dim({marker!r})",
            )
        if (found := _axis(position, axis, marker)) is not None:
            axes.append(found)
    return axes


def _axis(leaf: int, axis: int, marker: Any) -> Axis | None:  # noqa: ANN401 - what torch takes
    if isinstance(marker, _DimHint) and marker.type.name in ("DYNAMIC", "AUTO"):
        return Axis(
            leaf,
            axis,
            name=None,
            root=f"{leaf}:{axis}",
            size=int,
            smallest=marker.min or 0,
            largest=marker.max,
            hinted=True,
            optional=marker.type.name == "AUTO",
        )
    if not isinstance(marker, Dim):
        return None
    root = getattr(marker, "root", marker)
    bounds = (root.min if isinstance(root.min, int) else 0), root.max
    return Axis(
        leaf,
        axis,
        name=marker.__name__ if root is marker else None,
        root=root.__name__,
        size=(lambda n: int(marker.fn(n))) if root is not marker else int,  # type: ignore[attr-defined]
        smallest=bounds[0],
        largest=bounds[1] if isinstance(bounds[1], int) else None,
    )


def enlarge_singletons(call: Call, axes: list[Axis]) -> Call:
    """Repeat samples of size 1 (or 0) along dynamic axes, so that tracing keeps them dynamic.

    All axes of one root grow together. Returns the call itself where there is nothing to do.

    Raises:
        UsageError: a dimension is declared dynamic but may have no size above 1.
    """
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    grown = False
    for root in dict.fromkeys(axis.root for axis in axes):
        together = [axis for axis in axes if axis.root == root]
        if all(leaves[a.leaf].shape[a.axis] > 1 for a in together):
            continue
        grown = True
        size = _traceable_size(together)
        for a in together:
            leaves[a.leaf] = _resized(leaves[a.leaf], a.axis, a.size(size))
    if not grown:
        return call
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return replace(call, args=args, kwargs=kwargs)


def _traceable_size(together: list[Axis]) -> int:
    """The smallest legal size of a root at which none of its axes has size 1."""
    first = together[0]
    smallest = max(2, *(a.smallest for a in together), 0)
    limits = [a.largest for a in together if a.largest is not None]
    largest = min(limits, default=smallest + _REACH)
    for size in range(smallest, min(largest, smallest + _REACH) + 1):
        if all(a.size(size) > 1 for a in together):
            return size
    raise UsageError(
        f"dimension {first.name or first.axis} is declared dynamic with largest size {largest}",
        hint="leave it static, or allow a size of 2 or more",
    )


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    old = tensor.shape[axis]
    if old == 0:
        shape = list(tensor.shape)
        shape[axis] = size
        return tensor.new_zeros(shape)
    return tensor.index_select(axis, torch.arange(size, device=tensor.device) % old)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named_symbols(
    exported: ExportedProgram, axes: list[Axis], call: Call
) -> tuple[dict[str, str], dict[str, int]]:
    """Torch's symbol -> the user's name, and -> the smallest size that was declared."""
    values = [n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"]
    count = pytree.tree_structure((call.args, call.kwargs)).num_leaves
    values = values[len(values) - count :]
    names = input_names(exported.call_spec.in_spec, call.parameters)
    named: dict[str, str] = {}
    placed: dict[str, str] = {}
    smallest: dict[str, int] = {}
    for a in axes:
        size: Any = values[a.leaf].shape[a.axis] if isinstance(values[a.leaf], Tensor) else None
        if not isinstance(size, torch.SymInt) or len(size.node.expr.free_symbols) != 1:
            continue
        (symbol,) = map(str, size.node.expr.free_symbols)
        smallest[symbol] = max(a.smallest, smallest.get(symbol, 0))
        if a.name is not None and size.node.expr.is_Symbol:
            named.setdefault(symbol, a.name)
        elif a.name is None:
            # A derived axis ("2*half") has its root's name; an unnamed one is called by its place.
            placed.setdefault(symbol, f"{names[a.leaf]}_dim_{a.axis}" if a.hinted else a.root)
    return {**placed, **named}, smallest


def legal_ranges(
    exported: ExportedProgram, declared: Mapping[str, int]
) -> dict[str, tuple[int, int | None]]:
    """Torch's symbol -> (smallest, largest) legal size; None for no upper bound.

    Args:
        exported: knows what the model needs.
        declared: symbol -> the smallest size the caller declared. Torch says 2 where it was told
            nothing, because it traces no smaller sizes; those work as well as they do in the model.
    """
    ranges: dict[str, tuple[int, int | None]] = {}
    for symbol, bounds in exported.range_constraints.items():
        lower = int(bounds.lower) if bounds.lower.is_finite else 0
        upper = int(bounds.upper) if bounds.upper.is_Integer else None
        if lower == 2:
            lower = min(lower, declared.get(str(symbol), lower))
        ranges[str(symbol)] = (max(lower, 0), upper)
    return ranges
