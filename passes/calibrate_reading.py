"""Calibration inputs as the caller gives them: read batch by batch, held against the program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
from torch import SymInt, Tensor

from planish.ir.errors import PlanishError, UsageError
from planish.ir.program import Program
from planish.ir.tensortype import dim_text, dtype_name


def batches(calibration: Iterable[Any]) -> Iterator[Any]:
    """The caller's batches, with errors that say what went wrong on the caller's side."""
    if isinstance(calibration, (Mapping, Tensor, str, bytes)):
        kind = "dict of inputs" if isinstance(calibration, Mapping) else type(calibration).__name__
        raise UsageError(
            f"calibration is one {kind}, not an iterable of inputs",
            hint="put it into a list: calibration=[inputs]",
        )
    try:
        iterator = iter(calibration)
    except TypeError:
        raise UsageError(
            f"calibration is a {type(calibration).__name__}, which cannot be iterated",
            hint="pass a list, a generator or a DataLoader of inputs",
        ) from None
    count = 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # the caller's own code, which may raise anything
            raise UsageError(
                f"calibration failed after {count} batches: {type(error).__name__}: {error}"
            ) from error
        yield batch
        count += 1


def flat(batch: object, program: Program, number: int) -> tuple[Any, ...]:
    """One batch as flat inputs on the CPU; errors give its ``origin``, a file, if it has one.

    Raises:
        UsageError: it does not fit the program; says what would.
    """
    where = f"calibration batch {number}"
    origin = getattr(batch, "origin", None)
    if isinstance(origin, str):
        where += f" ({origin})"
    if isinstance(batch, Mapping):
        args: tuple[Any, ...] = ()
        kwargs = dict(batch)
    elif isinstance(batch, (tuple, list)):
        args, kwargs = tuple(batch), {}
    elif isinstance(batch, Tensor):
        args, kwargs = (batch,), {}
    else:
        raise UsageError(
            f"a {type(batch).__name__} is no input",
            where=where,
            hint="give tensors: a dict is keyword arguments, a tuple or list positional ones",
        )
    try:
        _refuse_labels(args, kwargs, program, where)
        inputs = program.signature.flatten(args, kwargs)
        check_inputs(inputs, program, where)
    except PlanishError as error:
        advice = f"{error.hint}; " if error.hint else ""
        raise UsageError(
            error.what, where=where, hint=f"{advice}the model takes {_taken(program)}"
        ) from error
    return tuple(v.detach().cpu() if isinstance(v, Tensor) else v for v in inputs)


def _refuse_labels(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], program: Program, where: str
) -> None:
    """Name the usual mistake: a loader of (input, label) pairs."""
    signature = program.signature
    taken = signature.parameters or signature.input_names
    names = ", ".join(taken)
    if len(args) > len(taken):
        raise UsageError(
            f"it holds {len(args)} inputs where the model takes {len(taken)} ({names}); "
            "the last looks like a label",
            where=where,
            hint="give inputs only: calibration=(batch[0] for batch in loader)",
        )
    stray = [name for name in kwargs if name not in taken and name not in signature.defaults]
    if stray:
        raise UsageError(
            f"it holds {stray[0]!r}, which the model does not take ({names})",
            where=where,
            hint="name inputs as the model does, and give inputs only, without labels",
        )
    # Tokenizers give more than a model needs; a value equal to the default is let pass later.
    optional = [
        name
        for name, value in kwargs.items()
        if name not in taken and isinstance(value, Tensor) and signature.defaults[name] is None
    ]
    if optional:
        raise UsageError(
            f"it holds {optional[0]!r}, which the model was captured without ({names})",
            where=where,
            hint="leave it out of the data, or capture with example inputs that hold it",
        )


def check_inputs(inputs: tuple[Any, ...], program: Program, where: str) -> None:
    """Hold a batch against the types of the program's inputs.

    Raises:
        UsageError: a dtype, a rank or a size is not legal; names the input.
    """
    sizes: dict[sympy.Symbol, int] = {}
    derived: list[tuple[str, sympy.Expr, int]] = []
    for node, name, value in zip(
        program.placeholders, program.signature.tensor_names, inputs, strict=True
    ):
        declared = node.meta.get("val")
        if not isinstance(declared, Tensor):
            continue
        if not isinstance(value, Tensor):
            raise UsageError(
                f"input {name!r} is a {type(value).__name__}, not a tensor", where=where
            )
        if value.dtype != declared.dtype:
            wanted = dtype_name(declared.dtype)
            raise UsageError(
                f"input {name!r} is {dtype_name(value.dtype)}; the model takes {wanted}",
                where=where,
                hint=f"convert it: {name}.to({declared.dtype})",
            )
        shape = _shape_text(declared, program)
        if value.dim() != declared.dim():
            raise _illegal(name, value, shape, where)
        # Torch types sizes as ints, which symbolic ones are not.
        dims: tuple[Any, ...] = tuple(declared.shape)
        for dim, size in zip(dims, value.shape, strict=True):
            expr = dim.node.expr if isinstance(dim, SymInt) else sympy.Integer(dim)
            if expr.is_Symbol:
                known = sizes.setdefault(expr, size)
                if known != size or not _in_range(program, expr, size):
                    raise _illegal(name, value, shape, where)
            elif expr.is_Integer:
                if int(expr) != size:
                    raise _illegal(name, value, shape, where)
            else:
                derived.append((name, expr, size))
    for name, expr, size in derived:
        at = expr.subs(sizes)
        if at.is_Integer and int(at) != size:
            raise UsageError(
                f"input {name!r} has a size of {size}; the other inputs ask for {at}", where=where
            )


def _in_range(program: Program, symbol: sympy.Symbol, size: int) -> bool:
    low, high = program.signature.ranges.get(str(symbol), (0, None))
    return low <= size and (high is None or size <= high)


def _taken(program: Program) -> str:
    """All inputs with their types and shapes: ``image: float32 [batch (1 to 64), 3, 8, 8]``."""
    pairs = zip(program.placeholders, program.signature.tensor_names, strict=True)
    parts = []
    for node, name in pairs:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            parts.append(f"{name}: {dtype_name(value.dtype)} {_shape_text(value, program)}")
        else:
            parts.append(name)
    return ", ".join(parts)


def _shape_text(declared: Tensor, program: Program) -> str:
    symbols, ranges = program.signature.symbols, program.signature.ranges
    parts = []
    for dim in declared.shape:
        part = str(dim_text(dim, symbols))
        if isinstance(dim, SymInt) and str(dim.node.expr) in ranges:
            low, high = ranges[str(dim.node.expr)]
            part += f" ({low} to {high if high is not None else 'any'})"
        parts.append(part)
    return "[" + ", ".join(parts) + "]"


def _illegal(name: str, value: Tensor, shape: str, where: str) -> UsageError:
    return UsageError(
        f"input {name!r} has shape {list(value.shape)}; the model takes {shape}",
        where=where,
        hint="give batches of legal sizes, or declare the dimension in dynamic_shapes",
    )
