"""ONNX forms of ``lstm`` and ``gru``: one operator per layer, weights stacked at export time.

ONNX orders the gates i, o, f, c where torch has i, f, c, o; and z, r, h where torch has r, z, h.
A state that starts at zero is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_dims import Dims
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_view import Table, View
from planish.ir.ops import argument, is_op

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


def _lstm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    states = list(argument(node, "hx"))
    return _recurrent(e, node, "LSTM", states)


def _gru(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    return _recurrent(e, node, "GRU", [argument(node, "hx")])


def _recurrent(e: Emitter, node: Node, kind: str, states: list[Node]) -> Any:  # noqa: ANN401
    source = node.args[0]
    assert isinstance(source, Node)
    known = [e.known(p) for p in argument(node, "params")]
    weights = [w for w in known if w is not None]
    if len(weights) != len(known) or len(source.meta["val"].shape) != 3:
        return None
    if argument(node, "train") and float(argument(node, "dropout")) != 0:
        return None
    layers, directions = int(argument(node, "num_layers")), 1 + int(argument(node, "bidirectional"))
    biased, batch_first = bool(argument(node, "has_biases")), bool(argument(node, "batch_first"))
    per_direction = 4 if biased else 2
    if len(weights) != layers * directions * per_direction:
        return None  # projected LSTM has one weight more; ONNX has no such operator
    hidden = int(weights[1].shape[1])
    view = e.view(source)
    if batch_first:
        b, t, _ = view.shape
        order = (1, 0, 2) if view.perm is None else tuple(view.perm[p] for p in (1, 0, 2))
        view = View(view.base, view.base_dims, view.dims, order)
    else:
        t, b, _ = view.shape
    finals: list[list[ir.Value]] = [[] for _ in states]
    for layer in range(layers):
        group = weights[layer * directions * per_direction :][: directions * per_direction]
        stacked = _stack(e, node, kind, layer, group, directions, biased)
        starts = [_start(e, s, layer, directions, layers) for s in states]
        outputs = e.ops(
            1 + len(states), kind, e.materialize(view), *stacked, None, *starts,
            hidden_size=hidden, direction="bidirectional" if directions == 2 else "forward",
            linear_before_reset=1 if kind == "GRU" else None,
        )  # fmt: skip
        for final, value in zip(finals, outputs[1:], strict=True):
            final.append(value)
        view = _sequence(e, outputs[0], (t, directions, b, hidden))
    result = view
    if batch_first:
        result = _batch_first(e, outputs[0], (t, directions, b, hidden))
    lasts = [f[0] if len(f) == 1 else e.op("Concat", *f, axis=0) for f in finals]
    return [result, *lasts]


def _sequence(e: Emitter, value: ir.Value, dims: Dims) -> View:
    """[T, directions, B, H] seen as [T, B, directions * H]; two directions need a transpose."""
    t, directions, b, hidden = dims
    if directions == 1:
        return View(value, dims, (t, b, hidden))
    moved = View(value, dims, dims, (0, 2, 1, 3))
    return View(e.materialize(moved), moved.shape, (t, b, int(directions) * int(hidden)))


def _batch_first(e: Emitter, value: ir.Value, dims: Dims) -> View:
    t, directions, b, hidden = dims
    moved = View(value, dims, dims, (2, 0, 1, 3))
    base = e.materialize(moved)
    return View(base, moved.shape, (b, t, int(directions) * int(hidden)))


def _stack(
    e: Emitter,
    node: Node,
    kind: str,
    layer: int,
    group: list[Tensor],
    directions: int,
    biased: bool,
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """W [D, gates * H, I], R [D, gates * H, H] and B [D, 2 * gates * H] of one layer."""
    per = len(group) // directions
    parts = [group[d * per : (d + 1) * per] for d in range(directions)]
    order = _GATES[kind]

    def arranged(tensor: Tensor) -> Tensor:
        gates = tensor.chunk(len(order), dim=0)
        return torch.cat([gates[g] for g in order], dim=0)

    def together(position: int) -> Tensor:
        return torch.stack([arranged(p[position]) for p in parts])

    name = f"{node.name}.{layer}"
    w = e.tensor(together(0), f"{name}.W")
    r = e.tensor(together(1), f"{name}.R")
    if not biased:
        return w, r, None
    return w, r, e.tensor(torch.cat([together(2), together(3)], dim=1), f"{name}.B")


def _start(e: Emitter, state: Node, layer: int, directions: int, layers: int) -> ir.Value | None:
    """The initial state of one layer; None where it is zero."""
    known = e.known(state)
    if is_op(state, *_ZEROS) or (known is not None and not known.any()):
        return None
    value = e.value(state)
    if layers == 1:
        return value
    start, end = layer * directions, (layer + 1) * directions
    return e.op("Slice", value, e.constant([start]), e.constant([end]), e.constant([0]))


RECURRENT: Table = {aten.lstm.input: _lstm, aten.gru.input: _gru}
