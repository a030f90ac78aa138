"""All calibration batches carried through a program together, one operator at a time.

A pass that rounds layer after layer needs what each layer reads once the layers before it are
rounded. Running the program again for every layer costs (layers) runs; here all batches wait at
the layer, and go on from there with its new weight: one run in all, and no statistic is stale.
The price is memory: every batch keeps its live values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from planish.ir.errors import PassError
from planish.ir.execute import evaluate
from planish.ir.ops import argument, aten, is_op
from planish.ir.program import Program
from planish.passes.observe.feeding import Padding
from planish.passes.observe.layout import NO_TOKENS, rows_of
from planish.passes.rounding.targets import CONVOLUTIONS


class Lockstep:
    """The state of all batches at one point of the program.

    Args:
        program: may be edited between two calls of ``advance``, behind the point reached.
        spool: the batches.
        padding_mask: the input that is 1 for tokens and 0 for padding, or "" for none.

    Attributes:
        kept: values that stay although nothing reads them any more; ``release`` ends that.
    """

    def __init__(self, program: Program, spool: Iterable[tuple[Any, ...]], padding_mask: str = ""):
        self.program = program
        self.kept: set[Node] = set()
        padding = Padding.of(program, padding_mask or None)
        self._padding = padding
        self._values: list[dict[Node, Any]] = []
        self._masks: list[tuple[int, Tensor | None]] = []
        for inputs in spool:
            self._values.append(dict(zip(program.placeholders, inputs, strict=True)))
            self._masks.append(padding.read(inputs) if padding_mask else (1, None))
        self._shared: dict[Node, Any] = {}  # what depends on no input
        self._done: set[Node] = set(program.placeholders)

    def advance(self, goal: Node) -> None:
        """Compute everything before ``goal`` for every batch."""
        with torch.no_grad():
            for node in list(self.program.graph.nodes):
                if node is goal:
                    return
                if node not in self._done and node.op in ("get_attr", "call_function"):
                    self._compute(node)
        raise PassError("the layer to stop at is not in the program", where=goal)

    def _compute(self, node: Node) -> None:
        self._done.add(node)
        if node.op == "get_attr":
            self._shared[node] = self.program.constants[str(node.target)]
            return
        if node.all_input_nodes and all(n in self._shared for n in node.all_input_nodes):
            self._shared[node] = evaluate(node, self._shared)
        else:
            for values in self._values:
                result = evaluate(node, _Both(values, self._shared))
                if node.users:
                    values[node] = result
        for operand in node.all_input_nodes:
            if operand not in self.kept:
                self._free(operand)

    def _free(self, value: Node) -> None:
        """Forget a value, unless something has yet to read it."""
        if all(user in self._done or user.op == "output" for user in value.users):
            self._shared.pop(value, None)
            for values in self._values:
                values.pop(value, None)

    def release(self, values: Iterable[Node]) -> None:
        """Keep some values no longer than others."""
        for value in values:
            self.kept.discard(value)
            self._free(value)

    def redo(self, nodes: Iterable[Node]) -> None:
        """Compute some nodes anew on the next advance: constants that they read have changed."""
        for node in nodes:
            self._done.discard(node)
            self._shared.pop(node, None)

    def live(self) -> list[dict[Node, Any]]:
        """Every value that something has yet to read, batch by batch."""
        return [{**self._shared, **own} for own in self._values]

    def values(self, nodes: Iterable[Node]) -> list[dict[Node, Any]]:
        """What some nodes gave, batch by batch."""
        named = list(nodes)
        return [{n: _Both(own, self._shared)[n] for n in named} for own in self._values]

    def inputs_of(self, reader: Node) -> Iterator[Tensor]:
        """What a linear or convolution reads, batch by batch, as ``[groups, tokens, inputs]``.

        Padding is left out where a mask was named. A value without an axis of tokens, such as the
        pooled state of a sentence, has none that are padding.
        """
        source = _operand(reader)
        if not is_op(reader, *CONVOLUTIONS):
            yield from self.tokens_of(source)
            return
        for values in self._values:
            yield _windows(reader, values[source] if source in values else self._shared[source])

    def tokens_of(self, source: Node) -> Iterator[Tensor]:
        """A value without padding, batch by batch, as ``[1, tokens, features]``."""
        layout = self._padding.layout(source)
        for values, (samples, mask) in zip(self._values, self._masks, strict=True):
            x = values[source] if source in values else self._shared[source]
            if mask is None or layout.problem == NO_TOKENS:
                yield x.reshape(1, -1, x.shape[-1])
            else:
                if layout.problem is not None:
                    raise PassError(f"padding cannot be left out: {layout.problem}", where=source)
                for rows in rows_of(layout, x, mask, samples):
                    yield rows.unsqueeze(0)


class _Both(dict[Node, Any]):
    """Values of one batch, then those of all."""

    def __init__(self, own: dict[Node, Any], shared: dict[Node, Any]):
        super().__init__()
        self._own, self._shared = own, shared

    def __missing__(self, node: Node) -> Any:  # noqa: ANN401 - whatever an operator gives
        return self._own[node] if node in self._own else self._shared[node]


def _operand(reader: Node) -> Node:
    """The computed operand of a linear, product or convolution."""
    source = reader.args[1 if is_op(reader, aten.addmm.default) else 0]
    assert isinstance(source, Node)
    return source


def operand_key(reader: Node) -> tuple[Any, ...]:
    """Readers with equal keys see the same inputs."""
    if is_op(reader, *CONVOLUTIONS):
        return (reader,)
    return (_operand(reader),)


def gram(pieces: Iterator[Tensor], reader: Node) -> Tensor:
    """``(2 / n) X^T X`` over n tokens, the Hessian of the squared error of a layer's output.

    Args:
        pieces: ``[groups, tokens, inputs]`` each.
        reader: named in errors.

    Returns:
        float64 ``[groups, inputs, inputs]``.

    Raises:
        PassError: there is no token, or a value is not finite.
    """
    total: Tensor | None = None
    tokens = 0
    for piece in pieces:
        x = piece.float()
        part = (x.transpose(1, 2) @ x).double()
        total = part if total is None else total + part
        tokens += x.shape[1]
    if total is None or not tokens:
        raise PassError("no calibration input reaches this layer", where=reader)
    if not bool(total.isfinite().all()):
        raise PassError("the inputs of this layer are not all finite", where=reader)
    return total * (2 / tokens)


def _windows(node: Node, x: Tensor) -> Tensor:
    """The windows a convolution multiplies, ``[groups, windows, inputs]``.

    A convolution is a linear layer on its windows: one per group of channels.
    """
    weight = node.args[1]
    assert isinstance(weight, Node)
    kernel = tuple(weight.meta["val"].shape[2:])
    rank = len(kernel)
    stride, dilation = (_numbers(argument(node, n), rank) for n in ("stride", "dilation"))
    padding = argument(node, "padding")
    groups = int(argument(node, "groups"))
    if x.dim() == rank + 1:
        x = x.unsqueeze(0)
    if padding == "same":
        sides = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [p for s in reversed(sides) for p in (s // 2, s - s // 2)]
    else:
        each = [0] * rank if padding == "valid" else _numbers(padding, rank)
        pads = [p for s in reversed(each) for p in (s, s)]
    x = F.pad(x, pads)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        # [.., windows, .., d (k - 1) + 1] at the end; every d-th of it is a tap
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    # [batch, channels, windows.., taps..] to [groups, batch windows, channels / groups, taps]
    x = x.unflatten(1, (groups, -1)).movedim(1, 0)
    places = tuple(range(3, 3 + rank))
    x = x.movedim(places, tuple(range(2, 2 + rank)))
    return x.flatten(1, 1 + rank).flatten(2)


def _numbers(value: Any, count: int) -> list[int]:  # noqa: ANN401 - a number or a list
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * count if len(numbers) == 1 else numbers
