"""Gram matrices of what layers read: ``X^T X`` over all calibration inputs, a few layers at a time.

The error of a layer's rounded weights is quadratic in the rounding with this matrix, so GPTQ, AWQ
and AdaRound need nothing else of the calibration inputs. ``d * d`` numbers per layer do not fit for
all layers of a large model at once: layers are taken in the program's order, as many in one sweep
as the limit allows, and a sweep ends at the last operand it waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError, RequirementError, UsageError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.observe.feeding import Batches, Padding, Tell, required
from planish.passes.observe.layout import Layout
from planish.passes.observe.reading import Reading, reading_of

LIMIT_BYTES = 512 << 20


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of one layer's input rows.

    Attributes:
        node: the layer.
        matrix: ``X^T X``, float64 [d, d] with ``d`` in the order of ``weight.flatten(1)``;
            [groups, d, d] for a convolution in groups. Layers that read alike share it: do not
            write into it.
        rows: how many rows X has (tokens, or output positions of a convolution).
        padded: whether padding is among the rows although there is a mask.
    """

    node: Node
    matrix: Tensor
    rows: int
    padded: bool = False

    def __iter__(self) -> Iterator[Any]:
        """Unpacks as ``node, matrix, rows``."""
        return iter((self.node, self.matrix, self.rows))


@dataclass
class _Sum:
    """One matrix while it grows."""

    layout: Layout
    matrix: Tensor
    rows: int = 0


class _Enough(Exception):  # noqa: N818 - no error: ends a run whose rest nobody needs
    pass


def gram(
    program: Program,
    nodes: Iterable[Node | str],
    calibration: Batches | None,
    *,
    padding_mask: str | None = None,
    limit_bytes: int = LIMIT_BYTES,
    tell: Tell | None = None,
) -> Iterator[Gram]:
    """Gram matrices of linears and convolutions, in the program's order.

    The program is read anew for every sweep. With ``limit_bytes=0`` each input has a sweep of its
    own, so whoever changes a layer between two of them gets the later ones as changed.

    Args:
        program: what to run.
        nodes: linears, products with a matrix, convolutions in one or two dimensions; or names.
        calibration: a spool.
        padding_mask: the input that is 1 for tokens and 0 for padding, [batch, tokens]; rows of
            padding are left out.
        limit_bytes: of all matrices of one sweep together; one input's is always made.
        tell: called with (batches done, batches in all) over all sweeps, first with 0.

    Raises:
        RequirementError: there is no calibration, or nothing but padding reaches a layer.
        UnsupportedError: a node is no such layer.
        UsageError: a name is none of the program, or the mask is no input of two axes.
        PassError: an operand holds NaN or infinity.
    """
    spool = required(calibration)
    padding = Padding.of(program, padding_mask)
    layers = [(node, reading_of(node)) for node in _ordered(program, nodes)]
    groups = _grouped(layers, limit_bytes)
    tell = tell or (lambda done, total: None)
    total, done = len(groups) * len(spool), 0
    tell(0, total)
    for group in groups:
        sums = {
            reading: _Sum(
                padding.layout(reading.x),
                torch.zeros(reading.groups, reading.size, reading.size, dtype=torch.float64),
            )
            for _, reading in group
        }
        for number, inputs in enumerate(spool):
            _sweep(program, inputs, number, padding, sums)
            done += 1
            tell(done, total)
        for node, reading in group:
            yield _result(node, reading, sums[reading])


def _sweep(
    program: Program,
    inputs: tuple[Any, ...],
    number: int,
    padding: Padding,
    sums: dict[Reading, _Sum],
) -> None:
    """Add one batch to all matrices of a group."""
    samples, mask = padding.read(inputs)
    waiting = {reading.x for reading in sums}

    def see(node: Node, value: Any) -> None:  # noqa: ANN401 - of any operator
        if node not in waiting:
            return
        for reading, held in sums.items():
            if reading.x is node:
                _add(held, reading, value, samples, mask, number)
        waiting.discard(node)
        if not waiting:
            raise _Enough

    try:
        for node, value in zip(program.placeholders, inputs, strict=True):
            see(node, value)
        run(program, inputs, observe=see)
    except _Enough:
        return


def _add(
    held: _Sum, reading: Reading, value: Tensor, samples: int, mask: Tensor | None, number: int
) -> None:
    for piece in held.layout.pieces(value.to(torch.float32), mask, samples):
        rows = reading.rows(piece)
        product = rows.transpose(1, 2) @ rows
        if not product.isfinite().all():
            raise PassError(
                f"calibration batch {number} makes {reading.x.name} NaN, infinite or larger than "
                "the square root of what float32 holds",
                where=reading.x,
                hint="look at this batch, or leave the operator in float",
            )
        # Float32 within a piece, float64 over all of them.
        held.matrix += product
        held.rows += rows.shape[1]


def _result(node: Node, reading: Reading, held: _Sum) -> Gram:
    if not held.rows:
        raise RequirementError(
            f"calibration never reached the operand of {node.name}: it is empty or all padding",
            where=node,
            hint="give calibration inputs with content",
        )
    matrix = held.matrix if reading.groups > 1 else held.matrix[0]
    return Gram(node, matrix, held.rows, held.layout.problem is not None)


def _ordered(program: Program, nodes: Iterable[Node | str]) -> list[Node]:
    """The nodes asked for, once each, in the program's order."""
    wanted = {n if isinstance(n, str) else n.name for n in nodes}
    found = [n for n in program.operators if n.name in wanted]
    missing = wanted - {n.name for n in found}
    if missing:
        raise UsageError(f"the program has no operator {min(missing)!r}")
    return found


def _grouped(
    layers: Sequence[tuple[Node, Reading]], limit_bytes: int
) -> list[list[tuple[Node, Reading]]]:
    """Consecutive layers whose matrices together stay below the limit; shared ones count once."""
    groups: list[list[tuple[Node, Reading]]] = []
    held: set[Reading] = set()
    for node, reading in layers:
        size = sum(r.bytes for r in held | {reading})
        if not groups or (reading not in held and size > limit_bytes):
            groups.append([])
            held = set()
        held.add(reading)
        groups[-1].append((node, reading))
    return groups
