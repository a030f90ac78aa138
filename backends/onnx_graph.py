"""``Emitter``: walks a program and builds one ONNX graph, node by node.

The value of a node is kept as a ``View``: a base value, seen through at most one reshape and one
permutation that are written out only when somebody needs them. So a linear layer works on rows
``[batch * sequence, features]`` from one end of a transformer to the other, and head splitting
costs nothing where the attention operator takes packed heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from planish.backends.onnx_dims import (
    Dim,
    Dims,
    NoExpressionError,
    dim_of,
    dim_text,
    dims_of,
    evaluate,
    product,
    reshape_plan,
)
from planish.backends.onnx_file import Initializer, initializer_of, onnx_dtype
from planish.backends.onnx_view import Held, Style, View, dtype_of
from planish.ir.errors import UnsupportedError
from planish.ir.program import Program

if TYPE_CHECKING:
    import onnx_ir as ir

T = TypeVar("T")


class Emitter:
    """Builds the ONNX graph of a program.

    Attributes:
        program: what is emitted.
        opset: ONNX operator set version.
        style: lowering choices.
        nodes: ONNX nodes so far, in order.
    """

    def __init__(self, program: Program, opset: int, style: Style):
        self.program = program
        self.opset = opset
        self.style = style
        self.nodes: list[ir.Node] = []
        self.functions: dict[Any, ir.Function] = {}
        self.names = dict(program.signature.symbols)
        self._held: dict[Node, Held] = {}
        self._views: dict[tuple[Any, ...], ir.Value] = {}
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._tensors: dict[ir.Value, Tensor] = {}
        self._dims: dict[Dim, ir.Value] = {}
        self._sources: dict[sympy.Symbol, tuple[Node, int]] = {}
        self._cache: dict[tuple[Any, ...], Any] = {}
        self._used_names: set[str] = set()
        self._current: Node | None = None

    # -- values -------------------------------------------------------------------------------

    def hold(self, node: Node, result: ir.Value | View | Sequence[Any]) -> None:
        """Remember what a node computes."""
        value = node.meta.get("val")
        if isinstance(result, (list, tuple)):
            parts = value if isinstance(value, (list, tuple)) else [value] * len(result)
            self._held[node] = [
                self._as_view(r, v, f"{node.name}.{i}")
                for i, (r, v) in enumerate(zip(result, parts, strict=False))
            ]
            return
        self._held[node] = self._as_view(result, value, node.name)
        self._note_sources(node)

    def _as_view(self, result: Any, value: Any, name: str) -> Any:  # noqa: ANN401
        if result is None or isinstance(result, View):
            return result
        dims = dims_of(value) if isinstance(value, Tensor) else ()
        self.describe(result, value, dims)
        if result.name is None or result.name.startswith("_"):
            result.name = self.unique(name)
        return View(result, dims, dims)

    def describe(self, value: ir.Value, like: Any, dims: Dims) -> None:  # noqa: ANN401
        """Give a value its type and sizes."""
        import onnx_ir as ir

        if value.dtype is None:
            value.dtype = ir.DataType(onnx_dtype(dtype_of(like)))
        if value.shape is None:
            value.shape = ir.Shape([dim_text(d, self.names) for d in dims])

    def _note_sources(self, node: Node) -> None:
        """Remember where the size of a new dimension can be read."""
        value = node.meta.get("val")
        if isinstance(value, SymInt) and value.node.expr.is_Symbol:
            self._sources.setdefault(value.node.expr, (node, 0))
        if not isinstance(value, Tensor):
            return
        for axis, dim in enumerate(dims_of(value)):
            if not isinstance(dim, int) and dim.is_Symbol:
                self._sources.setdefault(dim, (node, axis))

    def held(self, node: Node) -> Held:
        """What was remembered for a node."""
        return self._held[node]

    def held_or_none(self, node: Node) -> Held | None:
        """What was remembered for a node, if anything was."""
        return self._held.get(node)

    def view(self, node: Node) -> View:
        """The value of a tensor node as a view."""
        held = self._held.get(node)
        if held is None:
            return self._number(node)
        if not isinstance(held, View):
            raise UnsupportedError("a list of tensors is used as one tensor", where=node)
        return held

    def value(self, node: Node) -> ir.Value:
        """The value of a node, written out in its own shape."""
        return self.materialize(self.view(node), like=node.meta.get("val"))

    def rows(self, node: Node) -> tuple[ir.Value, View]:
        """The value as ``[rows, features]``, and a view that leads back to its shape."""
        view = self.view(node)
        if view.keeps_rows and len(view.base_dims) == 2:
            return view.base, view
        shape = view.shape
        flat: Dims = (product(shape[:-1]), shape[-1])
        if view.perm is not None:
            base = self.materialize(view)
            view = View(base, shape, shape)
        seen = View(view.base, view.base_dims, flat)
        value = self.materialize(seen, like=node.meta.get("val"))
        return value, View(value, flat, shape)

    def materialize(self, view: View, like: Any = None) -> ir.Value:  # noqa: ANN401
        """Write out the reshape and the permutation of a view."""
        value = view.base
        if view.dims != view.base_dims:
            key = (view.base, view.dims)
            if key not in self._views:
                value = self.op("Reshape", view.base, self.shape(view.base_dims, view.dims))
                self._views[key] = self._described(value, view.base, view.dims)
            value = self._views[key]
        if view.perm is not None:
            turned = (view.base, view.dims, view.perm)
            if turned not in self._views:
                value = self.op("Transpose", value, perm=list(view.perm))
                self._views[turned] = self._described(value, view.base, view.shape)
            value = self._views[turned]
        if like is not None:
            self.describe(value, like, view.shape)
        return value

    def _described(self, value: ir.Value, like: ir.Value, dims: Dims) -> ir.Value:
        import onnx_ir as ir

        if like.dtype is not None:
            value.dtype = like.dtype
            value.shape = ir.Shape([dim_text(d, self.names) for d in dims])
        return value

    def operand(self, argument: Any, dtype: torch.dtype) -> ir.Value:  # noqa: ANN401
        """A node or a number as a value of one dtype."""
        if isinstance(argument, Node):
            value = self.value(argument)
            return self.cast(value, dtype_of(argument.meta["val"]), dtype)
        return self.constant(argument, dtype)

    def cast(self, value: ir.Value, source: torch.dtype, goal: torch.dtype) -> ir.Value:
        """Convert, where the dtypes differ."""
        import onnx_ir as ir

        if source == goal:
            return value
        key = ("cast", value, goal)
        if key not in self._cache:
            cast = self.op("Cast", value, to=onnx_dtype(goal))
            cast.dtype, cast.shape = ir.DataType(onnx_dtype(goal)), value.shape
            self._cache[key] = cast
        result: ir.Value = self._cache[key]
        return result

    def cached(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Compute something once per graph."""
        if key not in self._cache:
            self._cache[key] = make()
        result: T = self._cache[key]
        return result

    # -- constants ----------------------------------------------------------------------------

    def constant(self, number: Any, dtype: torch.dtype = torch.int64) -> ir.Value:  # noqa: ANN401
        """A number, or a list of them, as an initializer; equal ones are shared."""
        array = torch.tensor(number, dtype=dtype)
        key = (dtype, tuple(array.shape), tuple(array.reshape(-1).tolist()), str(number))
        if key not in self._constants:
            label = "x".join(str(n) for n in np.atleast_1d(np.array(array.tolist())).flat)[:24]
            self._constants[key] = self.tensor(array, f"const.{label}")
        return self._constants[key]

    def tensor(self, tensor: Tensor, name: str, kind: str | None = None) -> ir.Value:
        """A new initializer; ``kind`` "int4" or "uint4" has two of its integers in one byte."""
        import onnx_ir as ir

        number = ir.DataType[kind.upper()] if kind else ir.DataType(onnx_dtype(tensor.dtype))
        value = ir.Value(
            name=self.unique(name), shape=ir.Shape(tensor.shape), type=ir.TensorType(number)
        )
        self._tensors[value] = tensor
        return value

    def known(self, node: object) -> Tensor | None:
        """The tensor behind a constant node of the program; None inside a branch."""
        if not isinstance(node, Node) or node.graph is not self.program.graph:
            return None
        return self.program.constant(node)

    def initializers(self, live: set[ir.Value]) -> list[Initializer]:
        """All constants that are read, in the order they came up."""
        return [initializer_of(v, t) for v, t in self._tensors.items() if v in live]

    def is_initializer(self, value: ir.Value) -> bool:
        """Whether a value is a constant of the graph."""
        return value in self._tensors

    # -- sizes --------------------------------------------------------------------------------

    def shape(self, source: Dims, goal: Dims) -> ir.Value:
        """The shape operand of a Reshape from one shape to another."""
        plan = reshape_plan(source, goal)
        return self.sizes(goal) if plan is None else self.constant(plan)

    def sizes(self, dims: Dims) -> ir.Value:
        """Sizes as an int64 vector, computed at run time where they must be."""
        if all(isinstance(dim, int) for dim in dims):
            return self.constant(list(dims))
        return self.cached(("sizes", dims), lambda: self._concat_sizes(dims))

    def _concat_sizes(self, dims: Dims) -> ir.Value:
        if len(dims) == 1:
            return self.size(dims[0])
        return self.op("Concat", *[self.size(dim) for dim in dims], axis=0)

    def size(self, dim: Dim) -> ir.Value:
        """One size as an int64 vector of length 1."""
        if dim not in self._dims:
            self._dims[dim] = evaluate(dim, self._size_leaf, self.op)
        return self._dims[dim]

    def _size_leaf(self, dim: Dim) -> ir.Value:
        if isinstance(dim, int):
            return self.constant([dim])
        if dim not in self._dims:
            if dim not in self._sources:
                raise NoExpressionError(str(dim))
            node, axis = self._sources[dim]
            if isinstance(node.meta["val"], SymInt):
                self._dims[dim] = self.op("Reshape", self.value(node), self.constant([1]))
            else:
                value = self.value(node)
                self._dims[dim] = self.op("Shape", value, start=axis, end=axis + 1)
        return self._dims[dim]

    def _number(self, node: Node) -> View:
        """A symbolic number as a scalar, from its expression where there is one."""
        from planish.backends.onnx_numbers import symbolic_number

        value = node.meta.get("val")
        if not isinstance(value, (SymInt, SymFloat, SymBool, int, float, bool)):
            raise UnsupportedError("the value of this node is not known at this point", where=node)
        self.hold(node, symbolic_number(self, node))
        return self.view(node)

    def size_of(self, number: Any) -> ir.Value:  # noqa: ANN401 - int, symbolic, or a node
        """A size given as an argument, as an int64 vector of length 1."""
        if isinstance(number, Node):
            return self.cached(
                ("vector", number),
                lambda: self.op("Reshape", self.value(number), self.constant([1])),
            )
        if isinstance(number, SymInt):
            return self.size(dim_of(number))
        return self.constant([int(number)])

    def scalar_size(self, size: int | SymInt) -> ir.Value:
        """A size as an int64 scalar."""
        vector = self.size(dim_of(size))
        empty = self.cached(
            ("empty",), lambda: self.tensor(torch.zeros(0, dtype=torch.int64), "const.empty")
        )
        return self.cached(("scalar", vector), lambda: self.op("Reshape", vector, empty))

    # -- nodes --------------------------------------------------------------------------------

    def op(
        self,
        name: str,
        *inputs: ir.Value | None,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401
    ) -> ir.Value:
        """Append an operator with one output.

        Args:
            name: ONNX operator.
            inputs: None for an omitted optional one.
            domain: "" for standard operators.
            attributes: numbers, strings, lists of them, graphs; None is dropped.
        """
        return self.ops(1, name, *inputs, domain=domain, **attributes)[0]

    def ops(
        self,
        outputs: int,
        name: str,
        *inputs: ir.Value | None,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401
    ) -> list[ir.Value]:
        """Append an operator with several outputs; see ``op``."""
        import onnx_ir as ir

        given = list(inputs)
        while given and given[-1] is None:
            # ONNX Runtime fuses no Conv whose bias is there, but empty.
            given.pop()
        node = ir.node(
            name,
            given,
            {k: v for k, v in attributes.items() if v is not None},
            domain=domain,
            num_outputs=outputs,
        )
        self.append(node)
        return list(node.outputs)

    def append(self, node: ir.Node) -> None:
        """Append a ready node, naming it after the program's node being emitted."""
        prefix = self._current.name if self._current is not None else "graph"
        for output in node.outputs:
            output.name = self.unique(f"_{prefix}.{node.op_type}")
        self.nodes.append(node)

    def unique(self, name: str) -> str:
        """A name that nothing else in the graph has."""
        candidate, count = name, 1
        while candidate in self._used_names:
            count += 1
            candidate = f"{name}.{count}"
        self._used_names.add(candidate)
        return candidate

    def reserve(self, names: Sequence[str]) -> None:
        """Keep names for inputs and outputs."""
        self._used_names.update(names)

    def add_input(self, node: Node, name: str) -> None:
        """Declare a placeholder as an input under the caller's name."""
        import onnx_ir as ir

        value = node.meta["val"]
        dims = dims_of(value) if isinstance(value, Tensor) else ()
        declared = ir.Value(name=name)
        self.describe(declared, value, dims)
        self._held[node] = View(declared, dims, dims)
        self._note_sources(node)

    @contextmanager
    def scope(self) -> Iterator[list[ir.Node]]:
        """Collect nodes for a subgraph; what is computed inside is not reused outside."""
        outside = self.nodes
        memo = (self._views, self._dims, self._cache)
        self.nodes = []
        self._views, self._dims, self._cache = (dict(m) for m in memo)  # type: ignore[assignment]
        try:
            yield self.nodes
        finally:
            self.nodes = outside
            self._views, self._dims, self._cache = memo

    def at(self, node: Node) -> None:
        """Say which node of the program is emitted now."""
        self._current = node
