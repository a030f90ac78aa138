"""What pruning one weight alone does to the outputs, for all weights in one walk.

All batches go through the dense program together (``Lockstep``). At each weight they wait, while
the rest of the program is run from there with the weight pruned in one way after another; nothing
before it is computed again. This is measured, not derived: pruning moves values too far for a first
derivative. Memory: the live values of all batches, and all values of one run of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.compare import Accumulator
from planish.ir.errors import source_line
from planish.ir.execute import evaluate, run
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.passes.base import OperatorError
from planish.passes.quantize.outputs import Batch, Padding, noise
from planish.passes.rounding.lockstep import Lockstep, gram
from planish.passes.sparsify.methods import LayerMethod, Task
from planish.passes.sparsify.patterns import Pattern
from planish.passes.sparsify.sites import Site

_WORST = 1e30  # stands for outputs that are not finite: sums and slopes stay numbers


@dataclass
class Alone:
    """One weight pruned in one way.

    Attributes:
        own: error of what its first reader computes.
        noise: energy at the outputs, relative to that of the outputs; a mean over the batches.
    """

    own: Accumulator = field(default_factory=Accumulator)
    noise: float = 0.0

    @property
    def output_db(self) -> float:
        """Signal to noise at the outputs."""
        return -10.0 * math.log10(self.noise) if self.noise > 0.0 else math.inf

    def row(self, site: Site, zeros: int) -> OperatorError:
        """For the report, with how many entries are to go in the end."""
        reader = site.reader
        share = zeros / site.weight.value.numel()
        return OperatorError(
            node=reader.name,
            operator=op_name(reader.target).removeprefix("aten."),
            source=source_line(reader),
            own=self.own.fidelity(),
            output_db=self.output_db,
            becomes=f"{share:.0%} zero" if zeros else "dense",
        )


@dataclass(frozen=True)
class Way:
    """How weights are pruned while they are measured.

    Attributes:
        method: prunes one matrix.
        reads_inputs: whether it wants ``H``.
        pattern: what the weights get.
        damping: for the method.
        refit: likewise.
    """

    method: LayerMethod
    reads_inputs: bool
    pattern: Pattern
    damping: float | None = None
    refit: int = 0

    def prune(self, site: Site, h: Tensor | None, shares: Sequence[float]) -> list[Tensor]:
        """The weight with each of these shares of zeros, in its own shape and type."""
        parts = site.rows().float().chunk(site.groups)
        known: list[dict[str, Any]] = [{} for _ in parts]
        found = []
        for share in shares:
            rows = []
            for number, part in enumerate(parts):
                own = None if h is None else h[number]
                zeros = self.pattern.zeros(part.numel(), share)
                made = self.method(
                    Task(part, own, self.pattern, zeros, self.damping, known[number], self.refit)
                )
                rows.append(torch.where(made.kept, made.rows, 0))
            found.append(site.from_rows(torch.cat(rows)).to(site.weight.value.dtype))
        return found


def measure_alone(
    program: Program,
    sites: Sequence[Site],
    shares: Mapping[str, Sequence[float]],
    way: Way,
    batches: Sequence[Batch],
    *,
    padding_mask: str = "",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Alone]]:
    """Prune each weight alone, in several ways, and measure what that does.

    Args:
        program: stays as it is.
        sites: the weights.
        shares: by name of weight, the shares of zeros to try.
        way: how they are pruned.
        batches: flat inputs.
        padding_mask: input that is 0 for padding, which counts neither in H nor in the outputs.
        tell: takes (weights done, weights in all).

    Returns:
        By name of weight, one result for each of its shares.
    """
    padding = Padding.named(program, padding_mask or None)
    answers = [run(program, inputs) for inputs in batches]
    state = Lockstep(program, [tuple(inputs) for inputs in batches], padding_mask)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    found: dict[str, list[Alone]] = {}
    # a tied table is looked up in long before the product where the walk meets it
    for done, site in enumerate(sorted(sites, key=lambda site: order[site.reader])):
        tell(done, len(sites))
        reader = site.reader
        state.advance(reader)
        h = None
        if way.reads_inputs:
            h = site.columns(gram(state.inputs_of(reader), reader))
        starts = state.live()
        if any(order[r] < order[reader] for r in site.weight.readers):
            # begin where the table has not been looked up in
            starts = [dict(zip(program.placeholders, b, strict=True)) for b in batches]
        rest = _Rest(program, site)
        results = found[site.name] = [Alone() for _ in shares[site.name]]
        weights = way.prune(site, h, shares[site.name])
        for inputs, answer, start in zip(batches, answers, starts, strict=True):
            dense, _ = rest.run(start, site.weight.value, answer, only_own=True)
            reference = padding.apply(inputs, answer)
            for result, weight in zip(results, weights, strict=True):
                own, outputs = rest.run(start, weight, answer)
                result.own.add(dense, own)
                energy = noise(reference, padding.apply(inputs, outputs))
                worst = _WORST if math.isnan(energy) else min(energy, _WORST)
                result.noise += worst / len(batches)
    tell(len(sites), len(sites))
    return {site.name: found[site.name] for site in sites}


class _Rest:
    """What of a program depends on one weight, and what that needs."""

    def __init__(self, program: Program, site: Site):
        self._program, self._site = program, site
        moved = set(site.weight.sources)
        for node in program.graph.nodes:
            if not moved.isdisjoint(node.all_input_nodes):
                moved.add(node)
        self._moved = moved

    def run(
        self,
        start: Mapping[Node, Any],
        weight: Tensor,
        answer: Sequence[Any],
        *,
        only_own: bool = False,
    ) -> tuple[Any, tuple[Any, ...]]:
        """What the first reader computes with another weight, and the outputs.

        Args:
            start: values that are there already.
            weight: in place of the site's.
            answer: the outputs of the dense program: of what does not depend on the weight.
            only_own: stop at the reader; the outputs are empty.
        """
        results = self._program.results
        env: dict[Node, Any] = {n: v for n, v in start.items() if n not in self._moved}
        env.update(dict.fromkeys(self._site.weight.sources, weight))
        reader = self._site.reader
        goals = [r for r in results if isinstance(r, Node) and r in self._moved]
        order, last = self._plan(env, [reader] if only_own else [reader, *goals])
        own = None
        with torch.no_grad():
            for node in order:
                if node.op == "get_attr":
                    env[node] = self._program.constants[str(node.target)]
                else:
                    env[node] = evaluate(node, env)
                if node is reader:
                    own = env[node]
                for operand in node.all_input_nodes:
                    if last[operand] is node and operand not in goals:
                        del env[operand]
        if only_own:
            return own, ()
        return own, tuple(
            env[r] if isinstance(r, Node) and r in self._moved else value
            for r, value in zip(results, answer, strict=True)
        )

    def _plan(
        self, have: Mapping[Node, Any], goals: Sequence[Node]
    ) -> tuple[list[Node], dict[Node, Node]]:
        """What is to be computed, in order, and the last of it that reads each value."""
        wanted: set[Node] = set()
        waiting = [g for g in goals if g not in have]
        while waiting:
            node = waiting.pop()
            if node not in wanted:
                wanted.add(node)
                waiting.extend(n for n in node.all_input_nodes if n not in have)
        order = [node for node in self._program.graph.nodes if node in wanted]
        return order, {operand: n for n in order for operand in n.all_input_nodes}
