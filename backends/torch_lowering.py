"""Rewrite a program into operators that plain torch has, in the forms its CPU kernels run fastest.

A new graph is made node by node. A translation may look back through the operands of its node in
the program, so an activation takes the convolution before it into one fused kernel; what the
convolution itself had become is then read by nobody and dropped. Nodes without a translation are
copied. The result is what every file of plain torch is written from: TorchScript, ``.pt2``, and
AOTInductor packages.

A weight in the layout of a kernel cannot be stored: torch has no format for it. ``Lowering.pack``
marks the operator that makes it; TorchScript runs it when the file is loaded, ``.pt2`` in every
run, and AOTInductor when it compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import KernelUse
from planish.ir.cost import sample_shape
from planish.ir.errors import UnsupportedError
from planish.ir.ops import op_name
from planish.ir.program import Constant, Program

aten = torch.ops.aten
PACK = "planish.pack"  # key in a node's meta: run once when the file is loaded
_OURS = "planish"

Translation = Callable[["Lowering", Node], Any]  # a Node, a tuple of them, or None: not this one
Table = Mapping[Any, Translation]


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program in operators of torch alone.

    Attributes:
        program: what it was made from; its signature and samples hold here too.
        graph: placeholders as the program's, ``get_attr`` of constants, operators, flat output.
        constants: by the names that the graph reads.
        kernels: what each quantized operator of the program became.
        origins: node of the program -> what stands for it here, whether still read or not.
    """

    program: Program
    graph: Graph
    constants: Mapping[str, Constant]
    kernels: tuple[KernelUse, ...] = ()
    origins: Mapping[Node, Any] = field(default_factory=dict)

    @cached_property
    def types(self) -> dict[Node, Any]:
        """The types of the nodes that stand for one of the program, as that one has them."""
        return {
            made: node.meta["val"]
            for node, made in self.origins.items()
            if isinstance(made, Node) and made.op != "get_attr" and "val" in node.meta
        }

    @property
    def packed(self) -> list[Node]:
        """The nodes that bring a constant into a kernel's layout, in order."""
        return [n for n in self.graph.nodes if n.meta.get(PACK)]

    @property
    def operators(self) -> Iterator[str]:
        """Names of all operators, as they are printed."""
        return (op_name(n.target) for n in self.graph.nodes if n.op == "call_function")


@dataclass
class Lowering:
    """A program on its way into operators of torch.

    Attributes:
        program: what is lowered; only read.
        exportable: whether ``torch.export`` must be able to hold the graph: float layers stay in
            ATen, and nothing is done to storage or by torch's own quantized tensors.
        graph: what has been made so far.
        constants: of the new graph.
        kernels: node of the program -> the integer kernel it became, or "" and why it did not.
    """

    program: Program
    exportable: bool = False
    graph: Graph = field(default_factory=Graph)
    constants: dict[str, Constant] = field(default_factory=dict)
    kernels: dict[Node, tuple[str | None, str]] = field(default_factory=dict)
    _values: dict[Node, Any] = field(default_factory=dict)
    _cache: dict[Any, Any] = field(default_factory=dict)
    _current: Node | None = None

    def value(self, node: Any) -> Any:  # noqa: ANN401 - nodes and the literals between them
        """What stands for a node of the program (or for the nodes within an argument)."""
        return map_arg(node, lambda n: self._values[n])

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:  # noqa: ANN401
        """Call an operator on values of the new graph."""
        node = self.graph.call_function(target, args, kwargs)
        if self._current is not None and "stack_trace" in self._current.meta:
            node.meta["stack_trace"] = self._current.meta["stack_trace"]
        return node

    def constant(self, name: str, tensor: Constant) -> Node:
        """Read a constant; the name is made distinct where another constant has it already."""
        chosen, count = name, 0
        while self.constants.get(chosen, tensor) is not tensor:
            count += 1
            chosen = f"{name}_{count}"
        self.constants[chosen] = tensor
        made: Node = self.cached(("constant", chosen), lambda: self.graph.get_attr(chosen))
        return made

    def pack(self, key: Any, target: Any, source: Node, *rest: Any) -> Node:  # noqa: ANN401
        """Bring a constant into a kernel's layout, once for all that read it so."""

        def make() -> Node:
            node = self.call(target, source, *rest)
            node.meta[PACK] = True
            return node

        made: Node = self.cached(("pack", target, source, key), make)
        return made

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """What was made under this key, made on first use."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def shape(self, node: Node) -> tuple[int, ...]:
        """Sizes of a program's value in its sample."""
        return sample_shape(self.program, node)

    def alone(self, node: Node) -> bool:
        """Whether a value of the program has one reader and is no output."""
        return len(node.users) == 1 and not any(u.op == "output" for u in node.users)

    def became(self, node: Node, kernel: str | None, reason: str = "") -> None:
        """Note what runs a quantized operator of the program."""
        self.kernels[node] = (kernel, reason)

    def run(self, table: Table) -> None:
        """Lower every node.

        Raises:
            UnsupportedError: an operator has no form in plain torch; names it.
        """
        for node in self.program.graph.nodes:
            self._current = node
            if node.op == "placeholder":
                self._values[node] = self.graph.placeholder(node.name)
            elif node.op == "get_attr":
                name = str(node.target)
                self._values[node] = self.constant(name, self.program.constants[name])
            elif node.op == "output":
                self.graph.output(self.value(node.args[0]))
            else:
                self._values[node] = self._lowered(node, table)
        self._tidy()

    def finished(self, kernels: tuple[KernelUse, ...]) -> Lowered:
        """What was made."""
        return Lowered(
            program=self.program,
            graph=self.graph,
            constants=self.constants,
            kernels=kernels,
            origins=dict(self._values),
        )

    def _lowered(self, node: Node, table: Table) -> Any:  # noqa: ANN401
        translation = table.get(node.target)
        made = translation(self, node) if translation is not None else None
        if made is not None:
            return made
        if getattr(node.target, "namespace", "") == _OURS:
            raise UnsupportedError(
                f"{op_name(node.target)} has no form in plain torch",
                where=node,
                hint="this is a defect of planish: report it with the model",
            )
        copied = self.call(node.target, *self.value(node.args), **self.value(node.kwargs))
        return copied

    def _tidy(self) -> None:
        """Drop what nobody reads."""
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))
        live = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.constants = {name: c for name, c in self.constants.items() if name in live}


def tensor_of(node: object) -> Tensor | None:
    """The type of a node's value, where it is a tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None
