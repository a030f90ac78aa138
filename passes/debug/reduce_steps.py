"""Ways to make a program simpler that leave its operators alone: each gives a new program.

None of them keeps what the program computes. ``planish reduce`` tries them, and keeps a step only
if the failure it is after is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from planish.ir.archive import raw_bytes
from planish.ir.errors import PassError
from planish.ir.infer import fake_constant, infer_node
from planish.ir.ops import is_pure_call
from planish.ir.program import Program
from planish.passes.debug.subgraph import assembled
from planish.passes.debug.subgraph_sizes import untold

# What pattern values repeat after; prime, so that rows of a matrix differ.
_PERIOD = 17


def only_sample(program: Program, number: int) -> Program:
    """The program with one of its samples."""
    new = program.clone()
    new.samples = (program.samples[number],)
    return new


def static(program: Program) -> Program | None:
    """The program at the sizes of its only sample, with arithmetic on sizes done.

    None where that cannot be: there is not one sample, or a branch holds types of its own.
    """
    if len(program.samples) != 1:
        return None
    if any(isinstance(n.target, HigherOrderOperator) for n in program.operators):
        return None
    graph = Graph()
    new = Program(graph, dict(program.constants), program.signature)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    mapping: dict[Node, Any] = {}
    sample: list[Any] = []
    for node, value in zip(program.placeholders, program.samples[0], strict=True):
        if isinstance(value, Tensor):
            sample.append(value)
            mapping[node] = graph.node_copy(node)
            mapping[node].meta["val"] = mode.from_tensor(value, static_shapes=True)
        else:
            mapping[node] = value
    try:
        for node in program.nodes:
            if node.op == "get_attr":
                mapping[node] = graph.node_copy(node)
                constant = program.constant(node)
                assert constant is not None  # bodies belong to branches, and there are none
                mapping[node].meta["val"] = fake_constant(new, constant)
            elif node.op == "call_function":
                mapping[node] = _static_call(new, node, mapping)
    except PassError:
        return None  # an operator that only knows symbolic sizes
    results = [mapping[n] for n in program.results if isinstance(n, Node)]
    tensors = tuple(n for n in results if _is_tensor(n))
    if not tensors:
        return None
    graph.output(tensors)
    return assembled(program, graph, program.constants, (tuple(sample),))


def _static_call(new: Program, node: Node, mapping: dict[Node, Any]) -> Any:  # noqa: ANN401 - a value
    """The call over static types, or the number it gives."""
    made = new.graph.node_copy(node, lambda n: mapping[n])
    value = infer_node(new, made)
    if isinstance(value, SymInt) and value.node.expr.is_Integer:
        value = int(value)
    if isinstance(value, (bool, int, float)):
        new.graph.erase_node(made)
        return value
    made.meta["val"] = value
    return made


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def fewer_outputs(program: Program) -> Iterator[Program]:
    """The program with one output only, for each; then with each output left out.

    What only the outputs left out needed goes with them, or, if that does not do, stays.
    """
    results = program.results
    if len(results) < 2:
        return
    choices = [(kept,) for kept in results]
    if len(results) > 2:
        choices += [tuple(r for r in results if r is not out) for out in results]
    for chosen in choices:
        yield _with_results(program, chosen, dead=False)
    for chosen in choices:
        yield _with_results(program, chosen, dead=True)


def _with_results(program: Program, results: tuple[Any, ...], *, dead: bool) -> Program:
    new = program.clone()
    nodes = {n.name: n for n in new.nodes}
    new.output.args = (tuple(nodes[r.name] for r in results),)
    for node in reversed(new.operators):
        if not dead and not node.users and is_pure_call(node):
            new.graph.erase_node(node)
    for node in list(new.graph.find_nodes(op="get_attr")):
        if not node.users:
            new.graph.erase_node(node)
    return assembled(program, new.graph, new.constants, new.samples)


def without_input(program: Program, position: int) -> Program | None:
    """The program without an input; None where it is read, or alone tells a dynamic size."""
    node = program.placeholders[position]
    if node.users:
        return None
    new = program.clone()
    new.graph.erase_node(new.placeholders[position])
    samples = tuple((*s[:position], *s[position + 1 :]) for s in program.samples)
    smaller = assembled(program, new.graph, new.constants, samples)
    return None if untold(smaller) - untold(program) else smaller


def plainer_constants(program: Program, name: str) -> Iterator[Program]:
    """The program with a constant of zeros, of ones, or of ``pattern`` values in place of its own.

    Nothing where the constant is as plain already.
    """
    value = program.constants[name]
    if isinstance(value, Tensor):
        for plain in _plainer(value, (torch.zeros, torch.ones, pattern)):
            new = program.clone()
            new.constants[name] = plain
            yield new


def plainer_samples(program: Program, number: int, position: int) -> Iterator[Program]:
    """The program with a sample input of ``pattern`` values, of zeros, or of ones.

    In this order, since little shows on zeros, and the second probe is drawn from the sample.
    """
    sample = program.samples[number]
    value = sample[position]
    if isinstance(value, Tensor):
        for plain in _plainer(value, (pattern, torch.zeros, torch.ones)):
            changed = (*sample[:position], plain, *sample[position + 1 :])
            rows = (*program.samples[:number], changed, *program.samples[number + 1 :])
            new = program.clone()
            new.samples = rows
            yield new


def _plainer(value: Tensor, makers: Sequence[Callable[..., Tensor]]) -> Iterator[Tensor]:
    if value.layout is not torch.strided or value.numel() == 0:
        return
    shape, dtype = tuple(value.shape), value.dtype
    for make in makers:
        try:
            plain = make(shape, dtype=dtype)
        except RuntimeError:  # rare element types cannot be filled
            continue
        if _same(plain, value):
            return  # it is as plain as this already
        yield plain


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(raw_bytes(a).tobytes() == raw_bytes(b).tobytes())


def pattern(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """Small values of both signs that need no file: ``(i * 7 % 17 - 8) / 8`` at flat index ``i``.

    Integers are ``i * 7 % 17 % 2``, which any table of two rows can look up.
    """
    index = torch.arange(torch.Size(shape).numel()) * 7 % _PERIOD
    if dtype.is_floating_point or dtype.is_complex:
        return ((index - 8) / 8).to(dtype).reshape(shape)
    return (index % 2).to(dtype).reshape(shape)
