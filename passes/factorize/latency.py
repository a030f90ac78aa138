"""What a layer of a rank takes on the target, measured on the layer alone at its sample's size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from planish.ir.capture import capture
from planish.ir.cost import sample_shape
from planish.ir.ops import argument, aten
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Timer
from planish.passes.factorize.factors import Factors
from planish.passes.factorize.rewrite import write_factors
from planish.passes.factorize.sites import Site, find_sites
from planish.passes.quantize.where import Where

# Ranks that are timed; those between are interpolated.
_TIMED = 4
_OPTIONS = ("stride", "padding", "dilation")


def latencies(
    sites: Sequence[Site], ranks: Mapping[str, Sequence[int]], timer: Timer
) -> dict[str, dict[int | None, float]]:
    """Seconds of each layer by its rank, None for the layer as it is.

    Layers of one shape are timed once.

    Args:
        sites: the layers.
        ranks: that are asked for, ascending, by layer.
        timer: of the target.

    Raises:
        PlanishError: a layer cannot be lowered to the target.
    """
    timed: dict[Hashable, dict[int | None, float]] = {}
    found = {}
    for site in sites:
        wanted = list(ranks[site.name])
        key = _shape(site, wanted)
        if key not in timed:
            timed[key] = _measured(site, wanted, timer)
        found[site.name] = dict(timed[key])
    return found


def _shape(site: Site, ranks: Sequence[int]) -> Hashable:
    source = _operand(site)
    options = tuple(str(argument(site.reader, n)) for n in _OPTIONS if site.weight.is_convolution)
    return (
        site.form,
        tuple(site.weight.value.shape),
        site.weight.value.dtype,
        sample_shape(site.program, source),
        site.bias is None,
        options,
        tuple(ranks),
    )


def _operand(site: Site) -> Node:
    """What the layer reads."""
    index = 1 if site.form == "table" or site.reader.target is aten.addmm.default else 0
    source = site.reader.args[index]
    assert isinstance(source, Node)
    return source


def _measured(site: Site, ranks: Sequence[int], timer: Timer) -> dict[int | None, float]:
    dense, inputs = alone(site)
    last = len(ranks) - 1
    some = sorted({ranks[i * last // (_TIMED - 1)] for i in range(_TIMED)}) if ranks else []
    programs = [dense, *(factored(dense, site, rank) for rank in some)]
    seconds = timer.seconds([(program, inputs) for program in programs])
    found: dict[int | None, float] = {None: seconds[0]}
    return found | {r: _between(r, some, seconds[1:]) for r in ranks}


def _between(rank: int, known: Sequence[int], seconds: Sequence[float]) -> float:
    """Linear between the ranks that were timed."""
    for low, high, a, b in zip(known, known[1:], seconds, seconds[1:], strict=False):
        if low <= rank <= high:
            return a + (b - a) * (rank - low) / (high - low)
    return seconds[0]


class _Layer(nn.Module):
    """One operator with the sizes of a layer."""

    def __init__(self, site: Site):
        super().__init__()
        value = site.weight.value
        shape = value.shape if site.form != "linear" else site.rows.shape
        self.weight = nn.Parameter(torch.randn(shape, generator=_generator()).to(value.dtype))
        outputs = torch.zeros(shape[0], dtype=value.dtype)
        self.bias = None if site.bias is None else nn.Parameter(outputs)
        self._target: Any = aten.linear.default if site.form == "linear" else site.reader.target
        self._table = site.form == "table"
        names = _OPTIONS if site.weight.is_convolution else ()
        self._options = [argument(site.reader, n) for n in names]

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401 - a tensor, which the operator does not say
        """The operator."""
        if self._table:
            return self._target(self.weight, x)
        return self._target(x, self.weight, self.bias, *self._options)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def alone(site: Site) -> tuple[Program, tuple[Tensor]]:
    """A program of the layer alone, its numbers random, and inputs for it."""
    shape = sample_shape(site.program, _operand(site))
    if site.form == "table":
        rows = len(site.weight.value)
        x = torch.randint(0, rows, shape, generator=_generator())
    else:
        x = torch.randn(shape, generator=_generator()).to(site.weight.value.dtype)
    return capture(_Layer(site).eval().requires_grad_(False), (x,)), (x,)


def factored(dense: Program, like: Site, rank: int) -> Program:
    """The program of a layer alone with factors in place of the weight."""
    program = dense.clone()
    sites, _ = find_sites(
        program, Where(), spatial=like.form == "spatial", embeddings=like.form == "table"
    )
    (site,) = sites
    outputs, inputs = site.rows.shape
    factors = Factors(
        torch.randn(rank, inputs, generator=_generator(), dtype=torch.float64),
        torch.randn(outputs, rank, generator=_generator(), dtype=torch.float64),
        None,
    )
    rewriter = Rewriter(program, "factorize")
    write_factors(rewriter, site, factors, "")
    return rewriter.finish()
