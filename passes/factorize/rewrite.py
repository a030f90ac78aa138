"""Write two operators in the place of one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument, aten, is_op
from planish.ir.rewriter import Rewriter
from planish.passes.factorize.factors import Factors
from planish.passes.factorize.sites import RULE, Site, pair

_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def write_factors(rewriter: Rewriter, site: Site, factors: Factors, note: str) -> bool:
    """Replace a weight and its operator by two thin ones; False where the site was denied.

    Args:
        rewriter: of the program.
        site: the weight.
        factors: of ``site.rows``.
        note: for the change.
    """
    with rewriter.site(RULE, site.reader) as allowed:
        if not allowed:
            return False
        write = {"linear": _linear, "table": _table, "pair": _pair, "spatial": _spatial}
        new = write[site.form](_Writer(rewriter, site), factors)
        rewriter.replace(site.reader, new)
        rewriter.note(note)
    return True


class _Writer:
    """New nodes in the place of one operator."""

    def __init__(self, rewriter: Rewriter, site: Site):
        self.rewriter, self.site = rewriter, site
        self._stem = site.name.removesuffix(".weight")

    def constant(self, value: Tensor, name: str) -> Node:
        """A new constant in the type of the weight."""
        new = value.to(self.site.weight.value.dtype).contiguous()
        return self.rewriter.constant(new, f"{self._stem}.{name}", like=self.site.reader)

    def call(self, target: Any, args: list[Any]) -> Node:  # noqa: ANN401 - an ATen operator
        """A new operator."""
        return self.rewriter.call(target, args, like=self.site.reader)

    def bias(self, shift: Tensor | None) -> Node | None:
        """The bias with what it takes up, or as it is."""
        bias, reader = self.site.bias, self.site.reader
        if isinstance(bias, Node):
            assert shift is None
            return bias
        if shift is not None:
            return self.constant(shift if bias is None else bias.double() + shift, "bias")
        if bias is None:
            return None
        node = reader.args[0] if is_op(reader, aten.addmm.default) else argument(reader, "bias")
        assert isinstance(node, Node)
        return node


def _linear(writer: _Writer, factors: Factors) -> Node:
    reader = writer.site.reader
    x = reader.args[1 if is_op(reader, aten.addmm.default) else 0]
    inner = writer.call(aten.linear.default, [x, writer.constant(factors.first, "first.weight")])
    second = writer.constant(factors.second, "second.weight")
    bias = writer.bias(factors.shift)
    return writer.call(aten.linear.default, [inner, second, *([] if bias is None else [bias])])


def _table(writer: _Writer, factors: Factors) -> Node:
    reader = writer.site.reader
    rows = writer.constant(factors.first.t(), "first.weight")
    inner = writer.call(aten.embedding.default, [rows, *reader.args[1:]])
    second = writer.constant(factors.second, "second.weight")
    return writer.call(aten.linear.default, [inner, second])


def _pair(writer: _Writer, factors: Factors) -> Node:
    """The window into few channels, stride and all, then their mixture at every place."""
    site = writer.site
    window = site.weight.value.shape[1:]
    rank = len(window) - 1
    places = [argument(site.reader, name) for name in ("stride", "padding", "dilation")]
    first = writer.constant(factors.first.unflatten(1, tuple(window)), "first.weight")
    inner = writer.call(site.reader.target, [site.reader.args[0], first, None, *places])
    second = writer.constant(factors.second[(..., *[None] * rank)], "second.weight")
    return writer.call(_PLAIN[rank], [inner, second, writer.bias(factors.shift)])


def _spatial(writer: _Writer, factors: Factors) -> Node:
    """The rows of the window first, then its columns."""
    site = writer.site
    outputs, inputs, height, width = site.weight.value.shape
    first = factors.first.unflatten(1, (inputs, height)).unsqueeze(-1)
    second = factors.second.unflatten(0, (outputs, width)).movedim(2, 1).unsqueeze(2)
    options = [pair(argument(site.reader, n)) for n in ("stride", "padding", "dilation")]
    down = [[option[0], neutral] for option, neutral in zip(options, (1, 0, 1), strict=True)]
    across = [[neutral, option[1]] for option, neutral in zip(options, (1, 0, 1), strict=True)]
    convolve = aten.conv2d.default
    inner = writer.call(
        convolve, [site.reader.args[0], writer.constant(first, "first.weight"), None, *down]
    )
    weight = writer.constant(second, "second.weight")
    return writer.call(convolve, [inner, weight, writer.bias(factors.shift), *across])
