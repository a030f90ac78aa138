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
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from planish.backends.stepwise_compare import (
    DEQUANTIZE,
    DYNAMIC,
    QUANTIZE,
    State,
    Tally,
    compare,
    note,
)
from planish.ir.errors import ExportError
from planish.ir.execute import evaluate, last_uses, run
from planish.ir.ops import is_op
from planish.ir.program import Program

if TYPE_CHECKING:
    import onnx

    from planish.backends.onnx_file import Initializer
    from planish.backends.onnx_graph import Emitter

# The outputs of one run of the file are held at once; more of them are split into several runs.
GROUP_BYTES = 2**28

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
    found = Tally()
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


def _walk(
    program: Program,
    inputs: Sequence[Any],
    values: Iterator[tuple[Node, list[tuple[_Seen, np.ndarray]]]],
    found: Tally,
    label: str,
) -> None:
    """Compute every node from the file's own values, and compare it with the file's."""
    state = State(dict(zip(program.placeholders, inputs, strict=True)))
    frees = last_uses(program)
    shown = next(values, None)
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                state.env[node] = program.constants[str(node.target)]
            elif node.op == "call_function":
                state.env[node] = evaluate(node, state.env)
                note(state, node)
                if shown is not None and shown[0] is node:
                    _take(state, node, shown[1], found, label)
                    shown = next(values, None)
            for dead in (*frees[node], *(() if node.users else (node,))):
                state.env.pop(dead, None)


def _take(
    state: State,
    node: Node,
    entries: Sequence[tuple[_Seen, np.ndarray]],
    found: Tally,
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
        compare(state, node, expected, value, found, label)
        if entry.part is None:
            state.env[node] = value
        else:
            parts[entry.part] = value
    if parts:
        state.env[node] = type(state.env[node])(parts)
    state.slack.pop(node, None)
    state.inexact.discard(node)
