"""A lowered program as TorchScript source, one line for each operator.

The source is made from the graph, not recorded from a run: sizes stay sizes, so nothing of the
samples is baked in, and ``torch.cond`` becomes an ``if``. Every line names the user's source line.

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        sym_size = attention_mask.size(0)
        embedding = torch.ops.aten.embedding(self.embeddings_weight, input_ids, 0)  # bert.py:98
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from planish.backends.torch_grids import SIZES, STRIDES
from planish.backends.torch_lowering import PACK, Lowered
from planish.ir.errors import UnsupportedError, source_line
from planish.ir.ops import ASSERTIONS, argument, op_name
from planish.ir.program import Constant

INDENT = "    "
# Of the operators that every build of torch for CPUs has, in Python and C++.
NAMESPACES = frozenset({"aten", "mkldnn", "onednn", "quantized"})
# What the source itself says: no variable, parameter or named tuple may be called so.
RESERVED = frozenset(
    """self torch math Tensor List Dict Tuple Optional Number int float bool str complex
    max min abs sum round None True False""".split()
    # And what torch itself renames when it writes a file.
    + "_ aten attribute CONSTANTS fork getattr inf nan infj nanj ops __torch__".split()
)

_INFIX: Mapping[Any, str] = {
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
    operator.and_: "&",  # also of numbers, which "and" would take for truth values
    operator.or_: "|",
    operator.xor: "^",
    operator.lshift: "<<",
    operator.rshift: ">>",
}
# TorchScript makes a real number of these where Python makes an integer.
_INTEGER_TOO = frozenset({operator.pow, round})
_CALLS: Mapping[Any, str] = {
    torch.sym_max: "max({})",
    torch.sym_min: "min({})",
    torch.sym_not: "not {}",
    torch.sym_float: "float({})",
    torch.sym_int: "int({})",
    torch.sym_ite: "({1} if {0} else {2})",
    torch.sym_sum: "sum({})",
    operator.neg: "-{}",
    operator.not_: "not {}",
    abs: "abs({})",
    math.ceil: "math.ceil({})",
    math.floor: "math.floor({})",
    math.trunc: "int({})",
    round: "round({})",
    **{
        getattr(torch, f"_sym_{name}"): f"math.{name}({{}})"
        for name in "sqrt cos cosh sin sinh tan tanh asin acos atan".split()
    },
    SIZES: "{}.size()",
    STRIDES: "{}.stride()",
}
_METHODS: Mapping[Any, str] = {
    torch.ops.aten.sym_size.int: "size",
    torch.ops.aten.sym_stride.int: "stride",
    torch.ops.aten.sym_numel.default: "numel",
    torch.ops.aten.sym_storage_offset.default: "storage_offset",
}


class Names:
    """Distinct names that TorchScript takes.

    Args:
        taken: names that exist already, besides those that the source itself needs.
    """

    def __init__(self, taken: tuple[str, ...] = ()):
        self._taken = {*taken, *RESERVED}

    def new(self, wanted: str) -> str:
        """A name near the wanted one that nobody has yet."""
        base = re.sub(r"\W", "_", wanted)
        if not re.match(r"[A-Za-z_]", base) or keyword.iskeyword(base):
            base = f"_{base}"
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


class Body:
    """Lines of source for one graph.

    Args:
        lowered: where constants are looked up.
        names: of variables; shared by nested graphs.
        attribute: constant's name -> how the source reads it.
        packed: packing node -> how the source reads what it made; empty to run it in place.

    Attributes:
        lines: of the source, indented.
        origins: for each line the node that it computes, if it computes one.
        variables: node -> the name of its value.
    """

    def __init__(
        self,
        lowered: Lowered,
        names: Names,
        attribute: Callable[[str], str],
        packed: Mapping[Node, str],
    ):
        self.lowered = lowered
        self.names = names
        self.attribute = attribute
        self.packed = packed
        self.lines: list[str] = []
        self.origins: list[Node | None] = []
        self.variables: dict[Node, str] = {}
        self._indent = 1
        self._current: Node | None = None
        self._from = {made: n for n, made in lowered.origins.items() if isinstance(made, Node)}

    def add(self, line: str, node: Node | None = None) -> None:
        """One line at the current depth, with the user's source line where it is known."""
        origin = source_line(node) if node is not None else None
        self.lines.append(INDENT * self._indent + line + (f"  # {origin}" if origin else ""))
        self.origins.append(node)

    def write(self, node: Node) -> None:
        """The line of one operator.

        Raises:
            UnsupportedError: TorchScript has no form for it.
        """
        self._current = node
        if node.op == "get_attr":
            held = self.lowered.constants[str(node.target)]
            if isinstance(held, Tensor):
                self.variables[node] = self.attribute(str(node.target))
            return
        if node.op != "call_function" or node.target in ASSERTIONS:
            return
        if node in self.packed:
            self.variables[node] = self.packed[node]
            return
        if node.target is torch.ops.higher_order.cond:
            self._cond(node, self.lowered.constants)
            return
        name = self.names.new(node.name)
        self.add(f"{name} = {self.expression(node)}", node)
        self.variables[node] = name

    def expression(self, node: Node) -> str:
        """The right side of an operator's line.

        Raises:
            UnsupportedError: TorchScript has no form for it.
        """
        self._current, target = node, node.target
        if target is operator.getitem:
            return f"{self.literal(node.args[0])}[{self.literal(node.args[1])}]"
        if target in _INFIX or target in _CALLS:
            text = self._arithmetic(node)
            return f"int({text})" if target in _INTEGER_TOO and self._is_integer(node) else text
        if target in _METHODS:
            tensor, *rest = (self.literal(a) for a in node.args)
            return f"{tensor}.{_METHODS[target]}({', '.join(rest)})"
        if isinstance(target, OpOverload):
            return self._operator(node, target)
        raise self._formless(op_name(target))

    def _formless(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{what} has no form in TorchScript",
            where=self._current,
            hint="rewrite this part of the model without it, or export to another target",
        )

    def _arithmetic(self, node: Node) -> str:
        """Arithmetic on sizes and other numbers."""
        if node.target is round and node.args[1:] not in ((), (None,)):
            raise self._formless("rounding to digits")
        # ``round`` may come with None for its digits.
        texts = [self.literal(a) for a in node.args if a is not None]
        if node.target in _INFIX:
            left, right = texts
            return f"({left} {_INFIX[node.target]} {right})"
        form = _CALLS[node.target]
        return form.format(*texts) if "{0}" in form else form.format(", ".join(texts))

    def _is_integer(self, node: Node) -> bool:
        value = self._from.get(node, node).meta.get("val")
        return isinstance(value, (int, SymInt))

    def _operator(self, node: Node, target: OpOverload) -> str:
        if target.namespace not in NAMESPACES:
            raise UnsupportedError(
                f"{op_name(target)} is no operator of torch: a process with torch alone could not "
                "load the file",
                where=node,
                hint="write this part of the model in torch's own operators",
            )
        declared = target._schema.arguments
        texts = [self._typed(v, a) for v, a in zip(node.args, declared, strict=False)]
        plain = _unambiguous(target)
        texts[plain:] = [
            f"{a.name}={t}" for a, t in zip(declared[plain:], texts[plain:], strict=False)
        ]
        by_name = {a.name: a for a in declared}
        if target is torch.ops.aten.full.default and isinstance(argument(node, "fill_value"), bool):
            texts += ["dtype=torch.bool"] * (node.kwargs.get("dtype") is None)
        texts += [
            f"{key}={self._typed(v, by_name[key])}"
            for key, v in node.kwargs.items()
            if v is not None or not by_name[key].has_default_value()
        ]
        space, name = target.namespace, target._schema.name.split("::")[1]
        return f"torch.ops.{space}.{name}({', '.join(texts)})"

    def _typed(self, value: Any, declared: torch.Argument) -> str:  # noqa: ANN401
        """An argument as its declared type wants it written."""
        kind = str(declared.type)
        if kind == "number" and isinstance(value, bool) and self._takes_tensor(declared.name):
            # As a number it would become an integer, and with it what is made of it and booleans.
            return f"torch.tensor({value})"
        if isinstance(value, (list, tuple)):
            if kind == "List[Optional[Tensor]]":
                return f"torch.jit.annotate({kind}, {self.literal(value)})"
            inner = re.sub(r"Optional\[(List\[.*\])\]$", r"\1", kind)
            if inner == "List[Optional[number]]":
                return f"torch.jit.annotate(List[Optional[Number]], {self.literal(value)})"
            if not value:
                plain = inner if inner.startswith("List[") else "List[int]"
                return f"torch.jit.annotate({plain}, [])"
            if inner == "List[float]":
                return f"[{', '.join(self._float(v) for v in value)}]"
            return self.literal(value)
        if kind in ("float", "Optional[float]") and value is not None:
            return self._float(value)
        if kind in ("List[int]", "Optional[List[int]]") and isinstance(value, int):
            return f"[{value}]"
        return self.literal(value)

    def _takes_tensor(self, name: str) -> bool:
        """Whether the current operator has an overload that takes a tensor for this argument."""
        assert self._current is not None
        return any(
            a.name == name and str(a.type) == "Tensor"
            for schema in _schemas(self._current.target)
            for a in schema.arguments
        )

    def _float(self, value: object) -> str:
        if isinstance(value, Node):
            return f"float({self.literal(value)})"
        return self.literal(float(value))  # type: ignore[arg-type] # a number by its schema

    def literal(self, value: Any) -> str:  # noqa: ANN401 - whatever an argument may be
        """A value as source."""
        if isinstance(value, Node):
            return self.variables[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.literal(v) for v in value)}]"
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        if isinstance(value, complex):
            return f"complex({self.literal(value.real)}, {self.literal(value.imag)})"
        if isinstance(value, str):
            return quoted(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        raise self._formless(f"a {type(value).__name__}")

    # -- branches -----------------------------------------------------------------------------

    def _cond(self, node: Node, held: Mapping[str, Constant]) -> None:
        """A branch; its bodies may branch in turn.

        Args:
            node: the ``cond``.
            held: what the ``get_attr`` nodes of its own graph read.
        """
        predicate, if_true, if_false, operands = node.args
        assert isinstance(operands, (list, tuple))
        name = self.names.new(node.name)
        for word, body in ((f"if bool({self.literal(predicate)}):", if_true), ("else:", if_false)):
            module = held[str(body.target)]  # type: ignore[union-attr] # a get_attr
            assert isinstance(module, GraphModule)
            self.add(word, node)
            self._indent += 1
            results = self._nested(module, list(operands))
            self.add(f"{name} = ({', '.join(results)},)")
            self._indent -= 1
        self.variables[node] = name

    def _nested(self, module: GraphModule, operands: list[Any]) -> list[str]:
        rest, held = iter(operands), dict(module.named_children())
        for inner in module.graph.nodes:
            self._current = inner
            if inner.op == "placeholder":
                self.variables[inner] = self.literal(next(rest))
            elif inner.op == "output":
                return [self.literal(r) for r in inner.args[0]]
            elif inner.op == "get_attr" and str(inner.target) in held:
                continue  # the body of a branch within this one
            elif inner.op == "get_attr":
                raise UnsupportedError(
                    "a branch holds a constant of its own",
                    where=inner,
                    hint="make it a buffer of the model",
                )
            elif inner.target is torch.ops.higher_order.cond:
                self._cond(inner, held)  # type: ignore[arg-type] # graph modules alone are read
            else:
                self.write(inner)
        raise AssertionError("a graph always ends in its output node")


def _schemas(target: Any) -> list[Any]:  # noqa: ANN401 - an OpOverload
    """Of all overloads of an operator."""
    packet = getattr(getattr(torch.ops, target.namespace), target._schema.name.split("::")[1])
    return [getattr(packet, name)._schema for name in packet.overloads()]


@cache
def _unambiguous(target: OpOverload) -> int:
    """How many leading arguments of an operator are called alike in all its overloads.

    The others are passed by name: TorchScript finds the overload by the arguments, and would take
    ``f(x, 5)`` for the first of those that have a number there.
    """
    names = [a.name for a in target._schema.arguments]
    least = len(names)
    for schema in _schemas(target):
        others = [a.name for a in schema.arguments if not a.kwarg_only]
        for position, (mine, other) in enumerate(zip(names, others, strict=False)):
            if mine != other:
                least = min(least, position)
    return least


def quoted(text: str) -> str:
    """A string in TorchScript's notation, which has no hexadecimal escapes."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\{ord(m[0]):03o}", plain) + '"'


def is_packing(node: Node) -> bool:
    """Whether a node is run when the file is loaded."""
    return bool(node.meta.get(PACK))
