"""The methods of a TorchScript file: ``forward``, and what brings weights into layout on load."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node

from planish.backends.script_call import Types, constant_type, kind_of, structure
from planish.backends.script_text import INDENT, Body, Names, is_packing, quoted
from planish.backends.torch_lowering import Lowered
from planish.ir.errors import UnsupportedError
from planish.ir.infer import reason
from planish.ir.ops import is_view
from planish.ir.program import Program
from planish.ir.tensortype import dim_text, dtype_name
from planish.ir.trees import encode


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a file is compiled from.

    Attributes:
        forward: source of the method.
        origins: line of ``forward``, from 1 -> the node that it computes.
        setstate: source of ``__getstate__`` and ``__setstate__`` of the submodule ``packed``; empty
            where nothing is packed.
        attributes: name -> constant of the program, held by the module itself.
        raw: name -> constant that ``packed`` stores.
        packed: name -> tensor in a kernel's layout, which ``packed`` holds while it lives.
        classes: the named tuples that ``forward`` mentions.
        call: how flat inputs fill the arguments, as JSON.
    """

    forward: str
    origins: dict[int, Node]
    setstate: str
    attributes: dict[str, Tensor]
    raw: dict[str, Tensor]
    packed: dict[str, Tensor]
    classes: dict[str, type]
    call: dict[str, Any]


def source_of(lowered: Lowered, remark: Callable[[str], None]) -> Source:
    """Write a lowered program as TorchScript.

    Raises:
        UnsupportedError: TorchScript cannot represent it; names the node.
    """
    attributes: dict[str, Tensor] = {}
    names = Names(("packed", "training", "forward"))
    chosen: dict[str, str] = {}

    def attribute(constant: str) -> str:
        if constant not in chosen:
            chosen[constant] = names.new(constant)
            attributes[chosen[constant]] = lowered.constants[constant]  # type: ignore[assignment] # a tensor, by its reader
        return f"self.{chosen[constant]}"

    packing = _Packing(lowered)
    types = Types()
    parameters, body, call = _opening(lowered, attribute, packing.reads, types, remark)
    for node in lowered.graph.nodes:
        if not _only_packed(node):
            body.write(node)
    body.add(f"return {_result(lowered, body, types, remark)}")
    head = f"def forward(self{''.join(', ' + p for p in parameters)}):"
    return Source(
        forward="\n".join([head, *body.lines]) + "\n",
        origins={k: n for k, n in enumerate(body.origins, start=2) if n is not None},
        setstate=packing.source(),
        attributes=attributes,
        raw=packing.kept,
        packed=packing.values,
        classes=types.classes(),
        call=call,
    )


def _only_packed(node: Node) -> bool:
    """Whether a node belongs to what is done when the file is loaded."""
    if is_packing(node) and all(is_packing(u) for u in node.users):
        return True
    return node.op == "get_attr" and bool(node.users) and all(is_packing(u) for u in node.users)


# -- inputs and outputs -----------------------------------------------------------------------


def _opening(
    lowered: Lowered,
    attribute: Callable[[str], str],
    packed: dict[Node, str],
    types: Types,
    remark: Callable[[str], None],
) -> tuple[list[str], Body, dict[str, Any]]:
    """Parameters, and a body that has taken them apart and checked them."""
    program = lowered.program
    signature = program.signature
    args, kwargs = signature.in_spec.children()
    specs = [*args.children(), *kwargs.children()]
    wanted = list(signature.parameters) or [f"input_{i}" for i in range(len(specs))]
    own = Names()
    parameters = [own.new(name) for name in wanted]
    body = Body(lowered, Names(tuple(parameters)), attribute, packed)
    placeholders = iter(program.placeholders)
    flat, leaf, texts, trees = 0, 0, [], []
    expressions: list[str] = []
    for name, spec in zip(parameters, specs, strict=True):
        kinds: list[tuple[str, Any]] = []
        fixed: list[tuple[int, object]] = []
        for position in range(spec.num_leaves):
            if leaf in signature.fixed:
                value = signature.fixed[leaf]
                fixed.append((position, value))
                kinds.append(
                    (
                        constant_type(value),
                        None if value is None else {"value": encode(value, name)},
                    )
                )
            else:
                kinds.append((kind_of(next(placeholders), program), flat))
                flat += 1
            leaf += 1
        shown = structure(spec, kinds, types, remark, f"the argument {name!r}")
        leaves = shown.leaves(name)
        for position, value in fixed:
            _check_constant(body, leaves[position], value, name)
        skip = {position for position, _ in fixed}
        expressions += [text for i, text in enumerate(leaves) if i not in skip]
        trees.append(shown.tree)
        default = spec.is_leaf() and bool(fixed)
        text = f" = {body.literal(fixed[0][1])}" if default else ""
        texts.append((f"{name}: {shown.type}", text))
    _take(lowered, body, expressions)
    return _declared(texts), body, {"args": trees}


def _declared(texts: list[tuple[str, str]]) -> list[str]:
    """Parameters; a default is possible only where all after it have one."""
    result, possible = [], True
    for text, default in reversed(texts):
        possible = possible and bool(default)
        result.append(text + (default if possible else ""))
    return result[::-1]


def _check_constant(body: Body, text: str, value: object, name: str) -> None:
    relation = "is None" if value is None else f"== {body.literal(value)}"
    nan = isinstance(value, float) and math.isnan(value)
    test = f"math.isnan({text})" if nan else f"{text} {relation}"
    message = f"input {name!r} was the constant {value!r} when this file was made"
    body.add(f"assert {test}, {quoted(message)}")


def _take(lowered: Lowered, body: Body, expressions: list[str]) -> None:
    """Give the flat inputs their names, and refuse what the program was not captured for."""
    program = lowered.program
    seen: dict[str, str] = {}
    inputs = lowered.graph.find_nodes(op="placeholder")
    rows = zip(
        inputs, program.placeholders, program.signature.tensor_names, expressions, strict=True
    )
    for made, node, name, text in rows:
        variable = text
        if not text.isidentifier():
            variable = body.names.new(node.name)
            body.add(f"{variable} = {text}")
        body.variables[made] = variable
        value = node.meta["val"]
        if isinstance(value, Tensor):
            _check_tensor(program, body, variable, name, value, seen)


def _check_tensor(
    program: Program, body: Body, variable: str, name: str, value: Tensor, seen: dict[str, str]
) -> None:
    """Assert an input's type and sizes.

    Args:
        program: whose input it is.
        body: gets the assertion.
        variable: the input's name in the source.
        name: the user's name for it.
        value: its type.
        seen: symbol -> the text of its size; grows by what this input says.
    """
    signature = program.signature
    tests = [f"{variable}.dtype == {value.dtype}", f"{variable}.dim() == {value.dim()}"]
    symbols: set[str] = set()
    for axis, size in enumerate(value.shape):
        text = f"{variable}.size({axis})"
        if isinstance(size, SymInt):
            symbols |= {str(s) for s in size.node.expr.free_symbols}
            tests += _size_tests(size.node.expr, text, seen, signature.ranges)
        else:
            tests.append(f"{text} == {size}")
    sizes = ", ".join(str(dim_text(d, signature.symbols)) for d in value.shape)
    ranges = [
        f"{signature.symbols.get(s, s)} from {low} to {high if high is not None else 'any size'}"
        for s, (low, high) in sorted(signature.ranges.items())
        if s in symbols
    ]
    wanted = f"{dtype_name(value.dtype)} [{sizes}]" + (f", {', '.join(ranges)}" if ranges else "")
    body.add(f"assert {' and '.join(tests)}, {quoted(f'input {name!r} must be {wanted}')}")


def _size_tests(
    expr: sympy.Expr,
    text: str,
    seen: dict[str, str],
    ranges: Mapping[str, tuple[int, int | None]],
) -> list[str]:
    """What a dynamic size must fulfill: ``a * symbol + b``; anything else is not tested.

    Args:
        expr: the size, as the program says it.
        text: the size, as the source reads it.
        seen: symbol -> the text of its size; grows where this size is the first to tell one.
        ranges: symbol -> smallest and largest legal size.
    """
    free = sorted(expr.free_symbols, key=str)
    if len(free) != 1 or not expr.is_polynomial(*free) or sympy.degree(expr, free[0]) != 1:
        return []
    symbol, coefficients = str(free[0]), sympy.Poly(expr, free[0]).all_coeffs()
    if not all(c.is_Integer for c in coefficients) or coefficients[0] < 0:
        return []
    factor, offset = (int(c) for c in coefficients)
    if symbol in seen:
        plain = factor == 1 and not offset
        return [f"{text} == {seen[symbol]}" + ("" if plain else f" * {factor} + {offset}")]
    tests = [f"({text} - {offset}) % {factor} == 0"] * (factor > 1)
    shifted = f"({text} - {offset})" if offset else text
    seen[symbol] = f"{shifted} // {factor}" if factor > 1 else shifted
    low, high = ranges.get(symbol, (0, None))
    least = factor * low + offset
    tests += [f"{text} >= {least}"] * (least > 0)
    return tests + ([f"{text} <= {factor * high + offset}"] if high is not None else [])


def _result(lowered: Lowered, body: Body, types: Types, remark: Callable[[str], None]) -> str:
    program = lowered.program
    (made,) = lowered.graph.output_node().args
    texts, kinds = [], []
    assert isinstance(made, (list, tuple))
    for value, original in zip(made, program.results, strict=True):
        text = body.literal(value)
        if _may_be_constant(value):  # the caller may write into it, and the file must not change
            text += ".clone()"
        elif isinstance(original, Node) and isinstance(original.meta["val"], Tensor):
            if original.meta["val"].dim() >= 3:  # a picture may lie channels-last
                text += ".contiguous()"
        texts.append(text)
        kinds.append((kind_of(original, program), None))
    shown = structure(program.signature.out_spec, kinds, types, remark, "the output")
    return shown.build(texts)


def _may_be_constant(node: object) -> bool:
    """Whether a value of the lowered graph may share the memory of a constant."""
    while isinstance(node, Node) and is_view(node.target) and node.args:
        node = node.args[0]
    return isinstance(node, Node) and (node.op == "get_attr" or is_packing(node))


# -- what is done on load ---------------------------------------------------------------------


class _Packing:
    """The submodule ``packed``: constants of the file, and what they become in memory.

    A weight that can be read back from the kernel's layout is kept in that layout alone; the rest
    keeps its codes beside it, for the file may be saved again.
    """

    def __init__(self, lowered: Lowered):
        self._lowered = lowered
        self._names = Names(("training", "raw", "state"))
        self.reads: dict[Node, str] = {}
        self.values: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self._stored: list[tuple[str, str]] = []  # (variable in setstate, text in getstate)
        self._sources: dict[Node, str] = {}
        self._body = Body(lowered, self._names, lambda _: "", {})
        results: dict[Node, Any] = {}
        for node in lowered.packed:
            self._take(node, results)

    def _take(self, node: Node, results: dict[Node, Any]) -> None:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in results:
                results[source] = self._lowered.constants[str(source.target)]
        args = torch.fx.node.map_arg(node.args, lambda n: results[n])
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: results[n])
        try:
            with torch.no_grad():
                results[node] = node.target(*args, **kwargs)  # type: ignore[operator] # an operator
        except RuntimeError as error:
            raise UnsupportedError(
                f"a constant does not go into the layout of its kernel: {reason(error)}",
                where=node,
                hint="this is a defect of planish: report it with the model",
            ) from error
        outer = [u for u in node.users if not is_packing(u)]
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                self._store(source, node, results[node] if outer else None)
        name = self._names.new(node.name)
        self._body.add(f"{name} = {self._body.expression(node)}")
        self._body.variables[node] = name
        if outer:
            self.values[name] = results[node]
            self.reads[node] = f"self.packed.{name}"
            self._body.add(f"self.{name} = {name}")

    def _store(self, source: Node, node: Node, packed: Any) -> None:  # noqa: ANN401
        if source in self._body.variables:
            return
        raw = self._lowered.constants[str(source.target)]
        assert isinstance(raw, Tensor)
        variable = self._names.new(str(source.target))
        self._body.variables[source] = variable
        alone = len(source.users) == 1 and packed is not None
        back = _way_back(raw, packed) if alone else None
        if back is not None:
            # The name that the packed value will get: nothing is named in between.
            self._stored.append((variable, f"self.{_peek(self._names, node.name)}{back}"))
        else:
            self.kept[variable] = raw
            self._stored.append((variable, f"self.{variable}"))

    def source(self) -> str:
        """``__getstate__`` and ``__setstate__``; empty where nothing is packed."""
        if not self.values:
            return ""
        texts = ", ".join(text for _, text in self._stored)
        lines = [
            "def __getstate__(self):",
            f"{INDENT}return ([{texts}], self.training)",
            "def __setstate__(self, state: Tuple[List[Tensor], bool]) -> None:",
            f"{INDENT}raw = state[0]",
            f"{INDENT}self.training = state[1]",
        ]
        for position, (variable, _) in enumerate(self._stored):
            lines.append(f"{INDENT}{variable} = raw[{position}]")
            if variable in self.kept:
                lines.append(f"{INDENT}self.{variable} = {variable}")
        return "\n".join([*lines, *self._body.lines]) + "\n"


def _peek(names: Names, wanted: str) -> str:
    """The name that ``names.new`` will give next, without taking it."""
    import copy

    return copy.deepcopy(names).new(wanted)


def _way_back(raw: Tensor, packed: Tensor) -> str | None:
    """How to read a weight back from a kernel's layout, bit by bit; None where that is not so."""
    if packed.layout == torch.strided:
        return None
    try:
        dense = packed.to_dense()
    except RuntimeError:  # a layout that oneDNN does not take apart
        return None
    if dense.dtype != raw.dtype:
        return None
    if dense.shape == raw.shape and torch.equal(dense, raw):
        return ".to_dense()"
    if dense.dim() == 2 and dense.t().shape == raw.shape and torch.equal(dense.t(), raw):
        return ".to_dense().t().contiguous()"
    if dense.numel() == raw.numel() and torch.equal(dense.reshape(raw.shape), raw):
        return f".to_dense().reshape({list(raw.shape)})"
    return None
