"""Values, names and calls as Python source; whatever a file may have put into them.

Names of nodes and constants, dimension names and source lines come from files. Here, a name becomes
an identifier, a string a literal, and a comment one line of printable characters; no text of a file
stands in generated code as it is.
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from planish.ir.archive import raw_bytes
from planish.ir.errors import UnsupportedError
from planish.ir.ops import op_name
from planish.passes.debug.module_operators import operator_name, reserved_names
from planish.passes.debug.reduce_steps import pattern

_INLINE = 16  # elements of a tensor that is written out
_COMMENT = 100  # characters
_HINT = "the reduced program.pt2 holds it; look at it with `planish show`"

# Functions that the generated file may need.
PATTERN = '''

def pattern(shape, *, dtype):
    """Small values of both signs, (i * 7 % 17 - 8) / 8 at flat index i; 0 and 1 for integers."""
    index = torch.arange(torch.Size(shape).numel()) * 7 % 17
    if dtype.is_floating_point or dtype.is_complex:
        return ((index - 8) / 8).to(dtype).reshape(shape)
    return (index % 2).to(dtype).reshape(shape)
'''

LOAD = '''

def load():
    """The tensors of constants.safetensors: a length, a JSON header, the bytes."""
    data = (Path(__file__).parent / "constants.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        begin, end = entry["data_offsets"]
        raw = torch.frombuffer(bytearray(data[start + begin : start + end]), dtype=torch.uint8)
        found[name] = raw.view(getattr(torch, DTYPES[name])).reshape(entry["shape"])
    return found
'''

# Names that mean something in the generated file, or in a class that derives from nn.Module.
_RESERVED = frozenset(
    {
        *keyword.kwlist,
        *keyword.softkwlist,
        *dir(builtins),
        *dir(torch.nn.Module()),
        *("torch", "nn", "Dim", "Tensor", "Path", "json", "math", "operator", "self", "stored"),
        *("inputs", "DTYPES", "load", "pattern"),
        *("Reduced", "build"),
        *reserved_names(),
    }
)
_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.pow: "**",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_NAMESPACES = ("aten", "prims")  # those that torch alone registers


def identifier(name: str, taken: set[str]) -> str:
    """A fresh identifier like ``name``, which is added to ``taken``."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[:80] or "value"
    if plain[0].isdigit():
        plain = f"v{plain}"
    found, count = plain, 0
    while found in taken or found in _RESERVED:
        count += 1
        found = f"{plain}_{count}"
    taken.add(found)
    return found


def comment(text: str) -> str:
    """Some text as a comment: one line, printable characters only, not too long."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(line.split())
    return "# " + (line if len(line) <= _COMMENT else line[: _COMMENT - 3] + "...")


def literal(value: Any, names: Mapping[Node, str]) -> str:  # noqa: ANN401 - whatever fx allows
    """An argument as source.

    Raises:
        UnsupportedError: no source can say it.
    """
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):  # fx has list types of its own
        return "[" + ", ".join(literal(v, names) for v in value) + "]"
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    if type(value) is float:
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if type(value) is complex and math.isfinite(abs(value)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    raise UnsupportedError(f"a {type(value).__name__} cannot be written as source", hint=_HINT)


def call(node: Node, names: Mapping[Node, str]) -> str:
    """The call of an operator as source.

    Raises:
        UnsupportedError: it needs more than torch, or has an argument that no source can say.
    """
    target = node.target
    args = [literal(a, names) for a in node.args]
    if target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if target in _INFIX and len(args) == 2:
        return f"{args[0]} {_INFIX[target]} {args[1]}"
    args += [f"{_plain(k)}={literal(v, names)}" for k, v in node.kwargs.items()]
    return f"{_function(target)}({', '.join(args)})"


def _function(target: Any) -> str:  # noqa: ANN401 - whatever fx calls
    if isinstance(target, OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        if namespace in _NAMESPACES:
            return f"torch.ops.{namespace}.{_plain(name)}.{_plain(target._overloadname)}"
        own = operator_name(target)
        if own is not None:
            return own
    else:
        name = getattr(target, "__name__", "")
        for module in (torch, math, operator):
            if name and getattr(module, name, None) is target:
                return f"{module.__name__}.{_plain(name)}"
        if name and getattr(builtins, name, None) is target:
            return _plain(name)
    raise UnsupportedError(
        f"{op_name(target)} is not an operator that torch alone can name", hint=_HINT
    )


def _plain(name: str) -> str:
    """An operator's or argument's own name, which is used as it is."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UnsupportedError(f"{name[:60]!r} cannot stand in source", hint=_HINT)
    return name


def tensor(value: Tensor) -> str | None:
    """A tensor as an expression; None where it is better kept in a file.

    Small ones are written out, and those of zeros, of ones, or of ``pattern`` values say so. The
    expression gives the same bits.
    """
    shape, dtype = tuple(value.shape), value.dtype
    for make, text in (
        (torch.zeros, "torch.zeros"),
        (torch.ones, "torch.ones"),
        (pattern, "pattern"),
    ):
        if (value.numel() != 1 or not value.dim()) and _gives(value, make, shape, dtype):
            return f"{text}({shape!r}, dtype={dtype})"
    if value.numel() > _INLINE:
        return None
    numbers = value.tolist()
    if not _gives(value, torch.tensor, numbers, dtype):
        return None
    return f"torch.tensor({literal(numbers, {})}, dtype={dtype})"


def _gives(
    value: Tensor, make: Callable[..., Tensor], argument: object, dtype: torch.dtype
) -> bool:
    try:
        made = make(argument, dtype=dtype)
    except (RuntimeError, TypeError):  # rare element types cannot be made this way
        return False
    return made.shape == value.shape and bool(
        raw_bytes(made).tobytes() == raw_bytes(value).tobytes()
    )


def restrided(text: str, value: Tensor) -> str:
    """The expression, brought into the memory order of ``value``."""
    if value.is_contiguous():
        return text
    if not torch.ops.aten.is_non_overlapping_and_dense(value):
        raise UnsupportedError("a tensor with gaps in memory has no short source", hint=_HINT)
    strided = f"torch.empty_strided({tuple(value.shape)}, {value.stride()}, dtype={value.dtype})"
    return f"{strided}.copy_({text})"
