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
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from planish.backends.torch_grids import SIZES, STRIDES
from planish.backends.torch_lowering import PACK, Lowered
from planish.ir.errors import UnsupportedError, source_line
from planish.ir.ops import ASSERTIONS, op_name

INDENT = "    "
_RESERVED = frozenset({"self", "torch", "Tensor", "List", "Dict", "Tuple", "Optional", "Number"})
_RESERVED_MODULES = frozenset({"math"})
_RESERVED_TOO = frozenset({"int", "float", "bool", "str", "max", "min", "abs", "print", "len"})

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
    operator.and_: "and",
    operator.or_: "or",
}
_CALLS: Mapping[Any, str] = {
    torch.sym_max: "max({})",
    torch.sym_min: "min({})",
    torch.sym_not: "not {}",
    torch.sym_float: "float({})",
    torch.sym_int: "int({})",
    torch.sym_ite: "torch.jit.annotate(int, {1} if {0} else {2})",
    operator.neg: "-{}",
    operator.not_: "not {}",
    math.ceil: "math.ceil({})",
    math.floor: "math.floor({})",
    round: "round({})",
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
    """Distinct names that TorchScript takes."""

    def __init__(self, taken: tuple[str, ...] = ()):
        self._taken = {*taken, *_RESERVED, *_RESERVED_TOO, *_RESERVED_MODULES}

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
        self.variables: dict[Node, str] = {}
        self._indent = 1

    def add(self, line: str, node: Node | None = None) -> None:
        """One line at the current depth, with the user's source line where it is known."""
        origin = source_line(node) if node is not None else None
        self.lines.append(INDENT * self._indent + line + (f"  # {origin}" if origin else ""))

    def write(self, node: Node) -> None:
        """The line of one operator."""
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
            self._cond(node)
            return
        name = self.names.new(node.name)
        self.add(f"{name} = {self.expression(node)}", node)
        self.variables[node] = name

    def expression(self, node: Node) -> str:
        """The right side of an operator's line.

        Raises:
            UnsupportedError: TorchScript has no form for it.
        """
        target = node.target
        if target is operator.getitem:
            return f"{self.literal(node.args[0])}[{self.literal(node.args[1])}]"
        if target in _INFIX:
            left, right = (self.literal(a) for a in node.args)
            return f"({left} {_INFIX[target]} {right})"
        if target in _CALLS:
            texts = [self.literal(a) for a in node.args]
            form = _CALLS[target]
            return form.format(*texts) if "{0}" in form else form.format(", ".join(texts))
        if target in _METHODS:
            tensor, *rest = (self.literal(a) for a in node.args)
            return f"{tensor}.{_METHODS[target]}({', '.join(rest)})"
        if isinstance(target, OpOverload):
            return self._operator(node, target)
        raise UnsupportedError(
            f"{op_name(target)} has no form in TorchScript",
            where=node,
            hint="export to ONNX, or rewrite this part of the model",
        )

    def _operator(self, node: Node, target: OpOverload) -> str:
        declared = {a.name: a for a in target._schema.arguments}
        positional = [a for a in target._schema.arguments if not a.kwarg_only]
        texts = [self._typed(v, a) for v, a in zip(node.args, positional, strict=False)]
        for key, value in node.kwargs.items():
            texts.append(f"{key}={self._typed(value, declared[key])}")
        space, name = target.namespace, target._schema.name.split("::")[1]
        return f"torch.ops.{space}.{name}({', '.join(texts)})"

    def _typed(self, value: Any, declared: torch.Argument) -> str:  # noqa: ANN401
        """An argument as its declared type wants it written."""
        kind = str(declared.type)
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
            if math.isnan(value) or math.isinf(value):
                return f'float("{value}")'
            return repr(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        raise UnsupportedError(f"a {type(value).__name__} has no form in TorchScript")

    # -- branches -----------------------------------------------------------------------------

    def _cond(self, node: Node) -> None:
        predicate, if_true, if_false, operands = node.args
        assert isinstance(operands, (list, tuple))
        name = self.names.new(node.name)
        for word, body in ((f"if bool({self.literal(predicate)}):", if_true), ("else:", if_false)):
            module = self.lowered.constants[str(body.target)]  # type: ignore[union-attr] # a get_attr
            assert isinstance(module, GraphModule)
            self.add(word, node)
            self._indent += 1
            results = self._nested(module, list(operands))
            self.add(f"{name} = ({', '.join(results)},)")
            self._indent -= 1
        self.variables[node] = name

    def _nested(self, module: GraphModule, operands: list[Any]) -> list[str]:
        rest = iter(operands)
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                self.variables[inner] = self.literal(next(rest))
            elif inner.op == "output":
                return [self.literal(r) for r in inner.args[0]]
            elif inner.op == "get_attr":
                raise UnsupportedError("a branch holds constants of its own", where=inner)
            else:
                self.write(inner)
        raise AssertionError("a graph always ends in its output node")


def is_packing(node: Node) -> bool:
    """Whether a node is run when the file is loaded."""
    return bool(node.meta.get(PACK))
