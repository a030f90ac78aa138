"""Hold a quantized file to its program one operator at a time.

Two runs of one quantized program drift apart: where a value lies between two integers, the last bit
of a float sum decides the rounding, and everything after it moves by a step. So whole outputs
prove little about integer kernels. What can be proved is that every operator, fed with the very
values that the file itself computed, gives what the program says:

    the file runs without the runtime's graph optimizations, and every value that stands for a node
    of the program becomes an output of it;
    every node is computed in torch from the file's own values of its arguments, or, where an
    argument was fused away, from what it is in turn computed from;
    integers may differ by one step, real numbers by the bound of their dtype.

Where codes themselves were fused away (a kernel that quantizes its own input), a code that rounds
the other way moves the result by what one step of one element is worth, and no more is allowed:
``_Slack`` follows it to the next value of the file.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

import planish.ir.quant_ops  # noqa: F401 - registers torch.ops.planish
from planish.backends.base import Stepwise
from planish.backends.onnx_view import View, dtype_of
from planish.backends.ort_recurrent_int8 import on_real_states
from planish.backends.ort_run import Session
from planish.ir.compare import BOUNDS, difference
from planish.ir.errors import ExportError
from planish.ir.execute import evaluate, last_uses, run
from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.ir.quantscheme import INTEGERS

if TYPE_CHECKING:
    import onnx

    from planish.backends.onnx_file import Initializer
    from planish.backends.onnx_graph import Emitter

QUANTIZE = torch.ops.planish.quantize.default
DEQUANTIZE = torch.ops.planish.dequantize.default
DYNAMIC = torch.ops.planish.dynamic_quantize.default

# The outputs of one run of the file are held at once; more of them are split into several runs.
GROUP_BYTES = 2**28

# Codes are what these hold; other integers are sizes and indices, which have no steps.
_CODES = frozenset(storage for _, _, storage in INTEGERS.values())
# operator -> positions of its two factors
_PRODUCTS: Mapping[Any, tuple[int, int]] = {
    **dict.fromkeys(
        (
            aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
            aten.convolution.default, aten.mul.Tensor,
        ),
        (0, 1),
    ),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}  # fmt: skip
# The runtime hands out only what NumPy can hold.
_UNREADABLE = (torch.bfloat16,)


def is_quantized(program: Program) -> bool:
    """Whether a program quantizes anything: a value, or only its weights."""
    return any(is_op(n, QUANTIZE, DEQUANTIZE, DYNAMIC) for n in program.operators)


@dataclass(frozen=True)
class Emission:
    """What was written, before the runtime saw it.

    Attributes:
        emitter: knows which value stands for which node.
        model: the graph, without its constants.
        initializers: the constants.
    """

    emitter: Emitter
    model: onnx.ModelProto
    initializers: list[Initializer]

    @property
    def program(self) -> Program:
        """The program as it was emitted: operators without an ONNX form are taken apart."""
        return self.emitter.program


@dataclass(frozen=True)
class _Seen:
    """A value of the file that stands for a node, or for one part of its list of results."""

    node: Node
    part: int | None
    view: View

    @property
    def name(self) -> str:
        return str(self.view.base.name)

    @property
    def dtype(self) -> torch.dtype:
        value = self.node.meta["val"]
        return dtype_of(value if self.part is None else value[self.part])

    def read(self, array: np.ndarray, like: Tensor) -> Tensor:
        """The node's value, seen through the view, from what the file computed.

        Raises:
            ExportError: the file computes another number of elements.
        """
        if array.size != like.numel():
            raise ExportError(
                f"the file computes {array.size} elements where the program has {like.numel()}",
                where=self.node,
                hint="this is a defect of planish: report it with the model",
            )
        value = torch.from_numpy(np.array(array)).to(like.dtype)
        if self.view.perm is None:
            return value.reshape(like.shape)
        inverse = sorted(range(like.dim()), key=self.view.perm.__getitem__)
        return value.reshape([like.shape[i] for i in inverse]).permute(self.view.perm)


def stepwise(
    emission: Emission, path: Path, probes: Sequence[tuple[str, Sequence[Any]]]
) -> Stepwise:
    """Compare every operator of a written file with its program.

    Args:
        emission: what was written.
        path: the file; copies with more outputs are written beside it and removed.
        probes: (label, flat inputs).

    Returns:
        What was compared, and the largest differences.

    Raises:
        ExportError: an operator differs by more than a step, or than the bound of its dtype; it
            names the node, its source line and the difference.
    """
    found = _Tally()
    for label, inputs in probes:
        seen = _seen(emission)
        groups = _groups(emission.program, seen, inputs)
        with _Copies(emission, path) as copies:
            _walk(emission.program, inputs, _values(copies, groups, inputs), found, label)
    return found.result(tuple(label for label, _ in probes))


# -- which values -----------------------------------------------------------------------------


def _seen(emission: Emission) -> list[_Seen]:
    """The values of the file that stand for nodes, in the program's order."""
    computed = {name for node in emission.model.graph.node for name in node.output}
    found: list[_Seen] = []
    for node in emission.program.operators:
        held = emission.emitter.held_or_none(node)
        parts = list(enumerate(held)) if isinstance(held, list) else [(None, held)]
        for part, view in parts:
            if isinstance(view, View) and view.base.name in computed:
                entry = _Seen(node, part, view)
                if entry.dtype not in _UNREADABLE:
                    found.append(entry)
    return found


def _groups(
    program: Program, seen: Sequence[_Seen], inputs: Sequence[Any]
) -> list[dict[Node, list[_Seen]]]:
    """Consecutive nodes whose values fit into memory together."""
    sizes: dict[Node, int] = {}
    run(program, inputs, observe=lambda node, value: sizes.update({node: _bytes(value)}))
    groups: list[dict[Node, list[_Seen]]] = []
    room = 0
    for entry in seen:
        size = sizes.get(entry.node, 0)
        if not groups or (entry.node not in groups[-1] and size > room):
            groups.append({})
            room = GROUP_BYTES
        if entry.node not in groups[-1]:
            room -= size
        groups[-1].setdefault(entry.node, []).append(entry)
    return groups


def _bytes(value: object) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_bytes(part) for part in value)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


# -- running the file -------------------------------------------------------------------------


class _Copies:
    """Copies of the file with other outputs; they share one data file for the constants."""

    def __init__(self, emission: Emission, path: Path):
        self.emission = emission
        self.path = path.with_name(f"{path.stem}.stepwise.onnx")
        self._written: tuple[Path, ...] = ()

    def __enter__(self) -> _Copies:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._written:
            file.unlink(missing_ok=True)

    def run(self, seen: Sequence[_Seen], inputs: Sequence[Any]) -> dict[str, np.ndarray]:
        """The file's own values, without any graph optimization of the runtime."""
        from planish.backends.onnx_file import onnx_dtype, write_model

        values = {entry.name: onnx_dtype(entry.dtype) for entry in seen}
        model = self.emission.model.__class__()
        model.CopyFrom(self.emission.model)
        _on_real_rows(model.graph)
        on_real_states(model.graph)
        del model.graph.output[:]
        for name, value in values.items():
            output = model.graph.output.add(name=name)
            output.type.tensor_type.elem_type = value
        self._written = write_model(
            model, self.emission.initializers, self.path, external_data_bytes=2**26
        )
        with Session(self.path, optimize=False) as session:
            return dict(zip(session.output_names, session.run(inputs), strict=True))


def _on_real_rows(graph: onnx.GraphProto) -> None:
    """Let products with packed weights leave their other operand as it is.

    At accuracy level 4 MatMulNBits rounds it to int8 inside, which no program says. What can be
    proved is the weight: codes, scales, zero points and their layout. What the rounding costs is
    part of the difference of the whole file.
    """
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
            if attribute.HasField("g"):
                _on_real_rows(attribute.g)


def _values(
    copies: _Copies, groups: Sequence[Mapping[Node, list[_Seen]]], inputs: Sequence[Any]
) -> Iterator[tuple[Node, list[tuple[_Seen, np.ndarray]]]]:
    """Every node with values in the file, in the program's order; one group in memory at a time."""
    for group in groups:
        arrays = copies.run([entry for entries in group.values() for entry in entries], inputs)
        for node, entries in group.items():
            yield node, [(entry, arrays[entry.name]) for entry in entries]


# -- comparing --------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What was compared so far."""

    names: set[str] = field(default_factory=set)
    unchecked: set[str] = field(default_factory=set)
    steps: int = 0
    relative: float = 0.0

    def result(self, probes: tuple[str, ...]) -> Stepwise:
        return Stepwise(
            probes=probes,
            values=len(self.names),
            unchecked=tuple(sorted(self.unchecked - self.names)),
            max_steps=self.steps,
            max_relative=self.relative,
        )


@dataclass
class _State:
    """Values under way: the file's own where it has them.

    Attributes:
        env: node -> value.
        slack: node -> how far a recomputed value may lie from what a kernel used inside, because
            codes that the file does not show rounded the other way; in units of the value.
        inexact: recomputed real values, whose last bits are not the file's.
    """

    env: dict[Node, Any]
    slack: dict[Node, float] = field(default_factory=dict)
    inexact: set[Node] = field(default_factory=set)


def _walk(
    program: Program,
    inputs: Sequence[Any],
    values: Iterator[tuple[Node, list[tuple[_Seen, np.ndarray]]]],
    found: _Tally,
    label: str,
) -> None:
    """Compute every node from the file's own values, and compare it with the file's."""
    state = _State(dict(zip(program.placeholders, inputs, strict=True)))
    frees = last_uses(program)
    shown = next(values, None)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                state.env[node] = program.constants[str(node.target)]
            elif node.op == "call_function":
                state.env[node] = evaluate(node, state.env)
                _note(state, node)
                if shown is not None and shown[0] is node:
                    _take(state, node, shown[1], found, label)
                    shown = next(values, None)
            for dead in (*frees[node], *(() if node.users else (node,))):
                state.env.pop(dead, None)


def _take(
    state: _State,
    node: Node,
    entries: Sequence[tuple[_Seen, np.ndarray]],
    found: _Tally,
    label: str,
) -> None:
    """Compare one node and go on with the file's value."""
    parts = list(state.env[node]) if entries[0][0].part is not None else []
    for entry, array in entries:
        expected = parts[entry.part] if entry.part is not None else state.env[node]
        if not isinstance(expected, Tensor):
            continue
        # In memory as torch would have it: some operators refuse to view what lies otherwise.
        value = torch.empty_like(expected).copy_(entry.read(array, expected))
        _compare(state, node, expected, value, found, label)
        if entry.part is None:
            state.env[node] = value
        else:
            parts[entry.part] = value
    if parts:
        state.env[node] = type(state.env[node])(parts)
    state.slack.pop(node, None)
    state.inexact.discard(node)


def _compare(
    state: _State, node: Node, expected: Tensor, value: Tensor, found: _Tally, label: str
) -> None:
    """Raise where a value of the file is not what the program says.

    Raises:
        ExportError: it names the node.
    """
    problem: str | None = None
    if value.dtype in _CODES and _makes_codes(node):
        away = (value.to(torch.int64) - expected.to(torch.int64)).abs()
        steps = int(away.max()) if away.numel() else 0
        allowed = 1 + math.ceil(_slack_of_arguments(state, node))
        if steps > allowed:
            count = int((away > allowed).sum())
            problem = f"differs by {steps} steps; {count} of {away.numel()} by more than {allowed}"
        found.steps = max(found.steps, steps)
    elif value.is_floating_point():
        problem = _real_problem(state, node, expected, value, found)
    elif any(n in state.inexact for n in node.all_input_nodes):
        found.unchecked.add(node.name)  # a comparison or an index of numbers the file hides
        return
    else:
        problem = difference([expected], [value], bounds=[0.0])
    if problem:
        raise ExportError(
            f"the file computes an operator unlike the program: {problem.removeprefix('output 0 ')}"
            f" ({label}, without the runtime's optimizations)",
            where=node,
            hint="this is a defect of planish or of the runtime: report it with the model; "
            "keep this operator in float meanwhile",
        )
    found.names.add(node.name)


def _real_problem(
    state: _State, node: Node, expected: Tensor, value: Tensor, found: _Tally
) -> str | None:
    values = [expected, *(state.env[n] for n in node.all_input_nodes)]
    bound = max(BOUNDS.get(v.dtype, 0.0) for v in values if isinstance(v, Tensor))
    finite = expected[expected.isfinite()]
    peak = max(1e-6, float(finite.abs().max())) if finite.numel() else 1e-6
    slack = state.slack.get(node, 0.0) / peak
    problem = difference([expected], [value], bounds=[bound + slack])
    if problem is None and finite.numel():
        both = expected.isfinite() & value.isfinite()
        error = (value[both].double() - expected[both].double()).abs()
        far = error.max().item() / peak if error.numel() else 0.0
        found.relative = max(found.relative, max(0.0, far - slack))
    return problem


def _makes_codes(node: Node) -> bool:
    """Whether integers of a node are codes: it quantizes, or only moves such around."""
    seen, queue = set(), [node]
    while queue:
        current = queue.pop()
        if is_op(current, QUANTIZE, DYNAMIC):
            return True
        value = current.meta.get("val")
        if current in seen or (isinstance(value, Tensor) and value.is_floating_point()):
            continue
        seen.add(current)
        queue += current.all_input_nodes
    return False


# -- codes that the file does not show --------------------------------------------------------


def _note(state: _State, node: Node) -> None:
    """What is known of a recomputed value, before the file's own takes its place."""
    value = state.env[node]
    real = isinstance(value, (tuple, list)) or (
        isinstance(value, Tensor) and value.is_floating_point()
    )
    if real or any(n in state.inexact for n in node.all_input_nodes):
        state.inexact.add(node)
    slack = _slack_of_arguments(state, node)
    if is_op(node, QUANTIZE, DYNAMIC):
        slack += 1.0
    elif node.target is operator.getitem and is_op(node.args[0], DYNAMIC) and node.args[1]:
        slack = 0.0  # scale and zero point are no codes
    if slack:
        state.slack[node] = slack


def _slack_of_arguments(state: _State, node: Node) -> float:
    """How far the slack of the arguments can move a result, one element of each being off."""
    loose = [n for n in node.all_input_nodes if state.slack.get(n)]
    if not loose:
        return 0.0
    total = 0.0
    for argument in loose:
        slack = state.slack[argument]
        if is_op(node, DEQUANTIZE):
            slack *= _peak(state.env[node.args[1]])  # type: ignore[index]
        elif is_op(node, QUANTIZE):
            slack /= float(state.env[node.args[1]].abs().min())  # type: ignore[index]
        elif node.target in _PRODUCTS:
            factors = [node.args[position] for position in _PRODUCTS[node.target]]
            if argument in factors:
                other = factors[0] if argument is factors[1] else factors[1]
                slack *= _peak(state.env[other] if isinstance(other, Node) else other)
        total += slack
    return total


def _peak(value: object) -> float:
    if isinstance(value, Tensor):
        return float(value.abs().max()) if value.numel() else 0.0
    return abs(value) if isinstance(value, (int, float)) else 1.0
