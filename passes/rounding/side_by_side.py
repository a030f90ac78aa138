"""A quantized program and the one before it, walked module by module with all batches at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError
from planish.ir.program import Program
from planish.passes.observe.feeding import Padding
from planish.passes.observe.layout import Layout, rows_of
from planish.passes.rounding.lockstep import Lockstep
from planish.passes.rounding.modules import Module


@dataclass(frozen=True)
class Batch:
    """One batch at one module.

    Attributes:
        floating: its inputs in the program before.
        quantized: its inputs in the quantized program.
        targets: its outputs in the program before.
        layouts: where the samples and tokens of each output lie.
        samples: how many there are.
        mask: false at padding, [samples, tokens]; None for none.
    """

    floating: Mapping[Node, Any]
    quantized: Mapping[Node, Any]
    targets: Sequence[Tensor]
    layouts: Sequence[Layout] = ()
    samples: int = 1
    mask: Tensor | None = None

    def kept(self, output: int, value: Tensor) -> Tensor:
        """One output without padding, where its layout lets tokens be told."""
        if self.mask is None or self.layouts[output].problem is not None:
            return value
        layout = self.layouts[output]
        return torch.cat(list(rows_of(layout, value, self.mask, self.samples)))

    def mixed(self, share: float) -> dict[Node, Any]:
        """The inputs, of which the program before gives a share."""
        if share == 1:
            return dict(self.floating)
        return {
            node: share * self.floating[node] + (1 - share) * value
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for node, value in self.quantized.items()
        }


class SideBySide:
    """All batches carried through the quantized program and the one before it, side by side.

    Args:
        program: quantized; edited while it is walked.
        floating: the program before.
        modules: of ``program``.
        spool: the batches.
        padding_mask: the input that is 0 at padding, which no error is counted at.

    Raises:
        PassError: a value of a module is not in the program before.
    """

    def __init__(
        self,
        program: Program,
        floating: Program,
        modules: Sequence[Module],
        spool: Iterable[Any],
        padding_mask: str | None = None,
    ):
        batches = list(spool)
        self._padding = Padding.of(program, padding_mask)
        self._fed = [self._padding.read(inputs) for inputs in batches]
        self.modules, self.floating = modules, Lockstep(floating, batches)
        self.quantized = Lockstep(program, batches)
        self._twins = {n.name: n for n in (*floating.placeholders, *floating.operators)}
        self._end = next(n for n in floating.graph.nodes if n.op == "output")
        for module in modules:
            self.quantized.kept.update(n for n in module.nodes if n.op == "get_attr")
            self.quantized.kept.update(module.inputs)
            self.floating.kept.update(self._twin(n) for n in (*module.inputs, *module.outputs))

    def _twin(self, node: Node) -> Node:
        """The node of the program before.

        Raises:
            PassError: there is none.
        """
        if node.name not in self._twins:
            raise PassError(
                "the program before it was quantized has no such value",
                where=node,
                hint="run learn-ranges right behind quantize",
            )
        return self._twins[node.name]

    def enter(self, index: int) -> list[Batch]:
        """Go on to a module, and in the program before behind it."""
        module = self.modules[index]
        self.quantized.advance(module.first)
        self.floating.advance(self._twin(module.first))
        later = {n for m in self.modules[index:] for n in m.inputs}
        gone = {n for m in self.modules[:index] for n in (*m.inputs, *m.outputs)} - later
        self.quantized.release(gone)
        self.floating.release(self._twin(n) for n in gone)
        inputs = [self._twin(n) for n in module.inputs]
        floating = [
            {n: values[t] for n, t in zip(module.inputs, inputs, strict=True)}
            for values in self.floating.values(inputs)
        ]
        after = self.modules[index + 1].first if index + 1 < len(self.modules) else None
        self.floating.advance(self._end if after is None else self._twin(after))
        targets = [self._twin(n) for n in module.outputs]
        layouts = [self._padding.layout(n) for n in module.outputs]
        return [
            Batch(f, q, [values[t] for t in targets], layouts, *fed)
            for f, q, values, fed in zip(
                floating,
                self.quantized.values(module.inputs),
                self.floating.values(targets),
                self._fed,
                strict=True,
            )
        ]
