"""The weights of a program that can be factored, and what a rank of each costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from planish.ir.cost import macs_of, sample_shape
from planish.ir.errors import NothingToDoError, source_line
from planish.ir.ops import argument, aten, is_op
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.passes.quantize.where import Where
from planish.passes.rounding.targets import Weight, find_weights

RULE = "factorize-weight"
FACTOR = "it is a factor already"
Form = Literal["linear", "pair", "spatial", "table"]
_TRANSPOSED = "the weight of a transposed convolution is no matrix of its outputs and inputs"
_RECURRENT = "the weights of recurrent layers are read step by step inside one operator"
_NEVER: dict[Any, str] = {
    aten.conv_transpose1d.default: _TRANSPOSED,
    aten.conv_transpose2d.input: _TRANSPOSED,
    aten.conv_transpose3d.input: _TRANSPOSED,
    aten.lstm.input: _RECURRENT,
    aten.gru.input: _RECURRENT,
    aten.rnn_tanh.input: _RECURRENT,
    aten.rnn_relu.input: _RECURRENT,
    aten.bilinear.default: "its weight has 3 axes",
}


@dataclass(frozen=True)
class Site:
    """A weight to be factored.

    Attributes:
        program: that it is of.
        weight: the constant and its one reader.
        form: linears, k*k then 1*1 convolutions, k*1 then 1*k, or a table of rows and a linear.
    """

    program: Program
    weight: Weight
    form: Form

    @property
    def name(self) -> str:
        """Of the constant."""
        return self.weight.name

    @property
    def reader(self) -> Node:
        """The operator that multiplies by it."""
        return self.weight.readers[0]

    @cached_property
    def rows(self) -> Tensor:
        """The matrix that is factored, [outputs, inputs].

        Of a spatial pair the outputs go with the columns of the window, the inputs with its rows;
        of a table the outputs are the features, the inputs the words.
        """
        return self.matrix(self.weight.value)

    def matrix(self, x: Tensor) -> Tensor:
        """Anything of the weight's shape as ``rows``."""
        if self.form == "spatial":
            # [O, I, kh, kw] -> [O kw, I kh]
            return x.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
        return x.t() if self.form == "table" else self.weight.as_rows(x)

    @cached_property
    def bias(self) -> Tensor | Node | None:
        """What the operator adds: a constant, something computed, or nothing."""
        if self.form == "table":
            return None
        if is_op(self.reader, aten.mm.default, aten.matmul.default):
            return None
        is_addmm = is_op(self.reader, aten.addmm.default)
        node = self.reader.args[0] if is_addmm else argument(self.reader, "bias")
        if not isinstance(node, Node):
            return None
        value = self.program.constant(node)
        return value if isinstance(value, Tensor) else node

    @property
    def largest(self) -> int:
        """The rank at which factors are exact."""
        return min(self.rows.shape)

    @property
    def parameters(self) -> int:
        """Of the weight as it is."""
        return self.weight.value.numel()

    def parameters_at(self, rank: int) -> int:
        """Of both factors."""
        return rank * sum(self.rows.shape)

    @cached_property
    def macs(self) -> int:
        """Of the operator as it is, on the sample."""
        return macs_of(self.program, self.reader)

    def macs_at(self, rank: int) -> int:
        """Of both operators, on the sample."""
        outputs, inputs = self.rows.shape
        if self.form == "table":
            return math.prod(sample_shape(self.program, self.reader)) * rank
        if self.form == "spatial":
            before, after = self._spatial_places()
            return rank * (before * inputs + after * outputs)
        return self.macs // (outputs * inputs) * rank * (outputs + inputs)

    def _spatial_places(self) -> tuple[int, int]:
        """Outputs of one channel of the first convolution and of the second."""
        source = self.reader.args[0]
        assert isinstance(source, Node)
        out = sample_shape(self.program, self.reader)
        width = sample_shape(self.program, source)[-1]
        batch = math.prod(out[:-3])
        return batch * out[-2] * width, batch * out[-2] * out[-1]

    @property
    def break_even(self) -> float:
        """The rank from which on the factors hold no fewer numbers than the weight."""
        return self.parameters / sum(self.rows.shape)

    @property
    def limit(self) -> float:
        """The rank from which on factors save nothing: no numbers, or where apart no work.

        Rows and then columns run at other sizes: with a stride their work grows faster.
        """
        if self.form != "spatial" or not self.macs:
            return self.break_even
        return min(self.break_even, self.macs / self.macs_at(1))


def find_sites(
    program: Program, where: Where, *, spatial: bool, embeddings: bool
) -> tuple[list[Site], list[Refusal]]:
    """Weights that can be factored, in the order of their readers, and why others cannot.

    Args:
        program: where to look.
        where: a choice among the operators.
        spatial: whether a convolution becomes two of one row and of one column.
        embeddings: whether tables count.

    Raises:
        NothingToDoError: there are none.
    """
    weights, refusals = find_weights(program, embeddings=embeddings, convolutions=True, where=where)
    refusals = [replace(r, rule=RULE) for r in refusals]
    for node in program.operators:
        if node.target in _NEVER and where.takes(node):
            refusals.append(Refusal(RULE, node.name, _NEVER[node.target], source_line(node)))
    sites = []
    for weight in weights:
        site = Site(program, weight, _form(weight, spatial=spatial))
        problem = _problem(site)
        if problem is None:
            sites.append(site)
        else:
            at = weight.readers[0]
            refusals.append(Refusal(RULE, at.name, problem, source_line(at)))
    if not sites and not any(r.reason == FACTOR for r in refusals):
        why = f": {refusals[0].node}: {refusals[0].reason}" if refusals else ""
        raise NothingToDoError(
            f"factorize found no weight it could factor{why}",
            hint="weights are constants read by linears, convolutions or constant matrix products",
        )
    return sites, refusals


def _form(weight: Weight, *, spatial: bool) -> Form:
    if is_op(weight.readers[0], aten.embedding.default):
        return "table"
    if not weight.is_convolution:
        return "linear"
    window = weight.value.shape[2:]
    return "spatial" if spatial and len(window) == 2 and min(window) > 1 else "pair"


def _problem(site: Site) -> str | None:
    weight = site.weight
    if site.reader.meta.get("from", ("",))[0] == "factorize":
        return FACTOR
    if len(weight.readers) > 1:
        return (
            f"{len(weight.readers)} operators read it (shared or tied): each would need factors "
            "of its own"
        )
    if weight.layout is not None:
        return f"it is {weight.layout}: its factors would be dense"
    if site.form in ("pair", "spatial") and int(argument(site.reader, "groups")) > 1:
        return "its channels come in groups, which share no factor"
    if site.form == "spatial" and isinstance(argument(site.reader, "padding"), str):
        return "its padding is a word: only numbers can be split between the two"
    if site.break_even <= 1:
        return f"factors of rank 1 hold no fewer numbers than its {site.parameters}"
    if is_op(site.reader, aten.addmm.default):
        return _addend_problem(site)
    return None


def _addend_problem(site: Site) -> str | None:
    """Why what ``addmm`` adds is no bias."""
    reader = site.reader
    if argument(reader, "beta") != 1 or argument(reader, "alpha") != 1:
        return "its product is scaled (alpha, beta): fold-scalar may help"
    bias = site.program.constant(reader.args[0])
    if not isinstance(bias, Tensor) or bias.shape != (len(site.rows),):
        return "what it adds is no constant with one number for each output"
    return None


def pair(value: Any) -> list[int]:  # noqa: ANN401 - a number or a list
    """An option of a convolution in the plane, for rows and for columns."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * 2 if len(numbers) == 1 else numbers
