"""ONNX forms of ``lstm`` and ``gru``: one operator per layer, weights stacked at export time.

ONNX orders the gates i, o, f, c where torch has i, f, c, o; and z, r, h where torch has r, z, h.
A state that starts at zero is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.onnx_dims import Dims
from planish.backends.onnx_graph import Emitter
from planish.backends.onnx_quantize import dequantized
from planish.backends.onnx_view import Table, View
from planish.ir.errors import UnsupportedError
from planish.ir.ops import argument, is_op

if TYPE_CHECKING:
    import onnx_ir as ir

aten = torch.ops.aten

_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


@dataclass(frozen=True)
class Rows:
    """A parameter of one direction: numbers, or codes with a scale for each block of a row.

    Attributes:
        values: [rows, ..].
        scale: [rows, blocks]; None for numbers.
        zero: [rows, blocks]; None for zero points of 0.
        block: columns of a block; the last one may have fewer.
    """

    values: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    block: int = 0

    @property
    def numbers(self) -> Tensor:
        """What the codes stand for."""
        if self.scale is None:
            return self.values
        codes = self.values.to(self.scale.dtype)
        if self.zero is not None:
            codes = codes - self._spread(self.zero)
        return codes * self._spread(self.scale)

    def _spread(self, parameters: Tensor) -> Tensor:
        columns = parameters.repeat_interleave(self.block, dim=1)
        return columns[:, : self.values.shape[1]]

    @property
    def plain_scale(self) -> Tensor | None:
        """[rows], where the codes are int8 with one scale for a row and zero points of 0."""
        plain = self.zero is None and self.values.dtype is torch.int8
        if self.scale is None or self.scale.shape[1] != 1 or not plain:
            return None
        return self.scale[:, 0]


@dataclass(frozen=True)
class Layer:
    """The parameters of one layer, gates in ONNX's order.

    Attributes:
        name: for its constants.
        w: [directions * gates * H, I].
        r: [directions * gates * H, H].
        bias: [directions, 2 * gates * H]; None for none.
        directions: 1 or 2.
        hidden: H.
    """

    name: str
    w: Rows
    r: Rows
    bias: Tensor | None
    directions: int
    hidden: int

    @property
    def attributes(self) -> dict[str, Any]:
        """What LSTM and GRU are told of it."""
        direction = "bidirectional" if self.directions == 2 else "forward"
        return {"hidden_size": self.hidden, "direction": direction}


# Emits one layer: (emitter, layer, operand, initial states or None) to [output, final states].
Cell: TypeAlias = "Callable[[Emitter, Layer, ir.Value, list[ir.Value | None]], list[ir.Value]]"


def _lstm(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    layers = read_layers(e, node, "LSTM")
    return None if layers is None else emit_layers(e, node, layers, _cell("LSTM"))


def _gru(e: Emitter, node: Node) -> Any:  # noqa: ANN401
    layers = read_layers(e, node, "GRU")
    return None if layers is None else emit_layers(e, node, layers, _cell("GRU"))


def _cell(kind: str) -> Cell:
    def emit(
        e: Emitter, layer: Layer, x: ir.Value, starts: list[ir.Value | None]
    ) -> list[ir.Value]:
        bias = None if layer.bias is None else e.tensor(layer.bias, f"{layer.name}.B")
        matrices = [_matrix(e, layer, rows, n) for rows, n in ((layer.w, "W"), (layer.r, "R"))]
        return e.ops(
            1 + len(starts), kind, x, *matrices, bias, None, *starts,
            linear_before_reset=1 if kind == "GRU" else None, **layer.attributes,
        )  # fmt: skip

    return emit


def _matrix(e: Emitter, layer: Layer, rows: Rows, name: str) -> ir.Value:
    """[directions, gates * H, ..], from codes where the program has them.

    In primitive operators, and the codes reshaped before they are scaled: OpenVINO 2026.4 keeps
    a DequantizeLinear of constants as it is, and then has no LSTM of weights that are computed.
    """
    columns, directions = int(rows.values.shape[1]), layer.directions
    sizes, label = (directions, -1, columns), f"{layer.name}.{name}"
    if rows.scale is None:
        return e.tensor(rows.values.reshape(sizes), label)
    blocks = rows.scale.shape[1]
    missing = blocks * rows.block - columns
    codes = torch.nn.functional.pad(rows.values, (0, missing))
    real = e.cast(e.tensor(codes, label), codes.dtype, rows.scale.dtype)
    shape = (directions, -1, blocks, rows.block) if blocks > 1 else sizes
    real = e.op("Reshape", real, e.constant(list(shape)))

    def parameter(tensor: Tensor, suffix: str) -> ir.Value:
        return e.tensor(tensor.reshape(*shape[:-1], 1), f"{label}.{suffix}")

    if rows.zero is not None:
        real = e.op("Sub", real, parameter(rows.zero.to(rows.scale.dtype), "zero"))
    real = e.op("Mul", real, parameter(rows.scale, "scale"))
    if blocks > 1:
        real = e.op("Reshape", real, e.constant([directions, -1, blocks * rows.block]))
    if missing:
        real = e.op("Slice", real, e.constant([0]), e.constant([columns]), e.constant([2]))
    return real


def read_layers(e: Emitter, node: Node, kind: str) -> list[Layer] | None:
    """The parameters of a recurrent operator; None where ONNX has no such operator."""
    source = node.args[0]
    assert isinstance(source, Node)
    read = [_read(e, p) for p in argument(node, "params")]
    params = [p for p in read if p is not None]
    if len(params) != len(read) or len(source.meta["val"].shape) != 3:
        return None
    if argument(node, "train") and float(argument(node, "dropout")) != 0:
        return None
    count, directions = int(argument(node, "num_layers")), 1 + int(argument(node, "bidirectional"))
    per = 4 if argument(node, "has_biases") else 2
    if len(params) != count * directions * per:
        # One weight more for each; torch's own library would leave it out.
        raise UnsupportedError(
            "ONNX has no LSTM with a projection",
            where=node,
            hint="use proj_size=0 and a linear layer behind the LSTM",
        )
    groups = [params[i : i + per] for i in range(0, len(params), per)]
    hidden = int(params[1].values.shape[1])
    layers = []
    for layer in range(count):
        parts = groups[layer * directions :][:directions]
        bias = None
        if per == 4:
            halves = [_together([p[i] for p in parts], kind).numbers for i in (2, 3)]
            bias = torch.cat([h.reshape(directions, -1) for h in halves], dim=1)
        w, r = (_together([p[i] for p in parts], kind) for i in (0, 1))
        layers.append(Layer(f"{node.name}.{layer}", w, r, bias, directions, hidden))
    return layers


def _read(e: Emitter, param: Node) -> Rows | None:
    known = e.known(param)
    if known is not None:
        return Rows(known)
    q = dequantized(param)
    if q is None:
        return None
    codes, scale, zero = (e.known(n) for n in (q.codes, q.scale, q.zero))
    if codes is None or scale is None or zero is None or codes.dim() != 2:
        return None
    if q.axis != (1 if q.block else 0) and q.axis is not None:
        return None  # scales of columns
    rows, columns = codes.shape

    def spread(parameters: Tensor) -> Tensor:
        return parameters if q.block else parameters.reshape(-1, 1).expand(rows, 1).contiguous()

    offset = spread(zero) if bool(zero.any()) else None
    return Rows(codes, spread(scale), offset, q.block or int(columns))


def _together(parts: list[Rows], kind: str) -> Rows:
    """One parameter of all directions, gates in ONNX's order."""
    forms = {(p.scale is None, p.block, p.values.dtype) for p in parts}
    if len(forms) > 1 or parts[0].scale is None:
        return Rows(torch.cat([_arranged(part.numbers, kind) for part in parts]))
    scales = [part.scale for part in parts if part.scale is not None]
    zeros = [
        torch.zeros_like(scale, dtype=part.values.dtype) if part.zero is None else part.zero
        for part, scale in zip(parts, scales, strict=True)
    ]
    values, scale, zero = (
        torch.cat([_arranged(tensor, kind) for tensor in tensors])
        for tensors in ([part.values for part in parts], scales, zeros)
    )
    return Rows(values, scale, zero if bool(zero.any()) else None, parts[0].block)


def _arranged(tensor: Tensor, kind: str) -> Tensor:
    gates = tensor.chunk(len(_GATES[kind]), dim=0)
    return torch.cat([gates[g] for g in _GATES[kind]], dim=0)


def emit_layers(e: Emitter, node: Node, layers: list[Layer], cell: Cell) -> list[Any]:
    """All layers of a recurrent operator, and the states they end in."""
    source, given = node.args[0], argument(node, "hx")
    states: list[Node] = list(given) if isinstance(given, (list, tuple)) else [given]
    assert isinstance(source, Node)
    batch_first = bool(argument(node, "batch_first"))
    view = e.view(source)
    if batch_first:
        b, t, _ = view.shape
        order = (1, 0, 2) if view.perm is None else tuple(view.perm[p] for p in (1, 0, 2))
        view = View(view.base, view.base_dims, view.dims, order)
    else:
        t, b, _ = view.shape
    finals: list[list[ir.Value]] = [[] for _ in states]
    for position, layer in enumerate(layers):
        starts = [_start(e, s, position, layer.directions, len(layers)) for s in states]
        outputs = cell(e, layer, e.materialize(view), starts)
        for final, value in zip(finals, outputs[1:], strict=True):
            final.append(value)
        dims: Dims = (t, layer.directions, b, layer.hidden)
        view = _sequence(e, outputs[0], dims)
    result = _batch_first(e, outputs[0], dims) if batch_first else view
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
