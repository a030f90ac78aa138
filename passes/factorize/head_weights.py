"""The weights of a product of attention heads, while their dimensions are turned."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from planish.ir.ops import argument
from planish.ir.rewriter import Rewriter
from planish.passes.factorize.head_sites import HeadProduct
from planish.passes.prune.groups import Group


class Weights:
    """The weights of a product, read by head and replaced whole."""

    def __init__(self, rewriter: Rewriter, product: HeadProduct):
        self.rewriter, self.product = rewriter, product
        self.moved: dict[Node, Node] = {}

    def read(self, linear: Node, name: str) -> Tensor | None:
        """A weight or bias in float64."""
        value = self.rewriter.program.constant(argument(linear, name))
        return None if value is None else value.double()

    def write(self, linear: Node, name: str, value: Tensor) -> None:
        """Replace it, or give the linear one."""
        old = argument(linear, name)
        if old is None:
            weight = argument(linear, "weight")
            held = self.rewriter.program.constant(weight)
            assert held is not None
            self.rewriter.insert_before(linear)
            wished = f"{str(weight.target).removesuffix('.weight')}.{name}"
            new = self.rewriter.constant(value.to(held.dtype), wished, like=linear)
            self.rewriter.set_args(linear, [*linear.args[:2], new])
            return
        held = self.rewriter.program.constant(old)
        assert held is not None
        self.rewriter.insert_before(old)
        made = value.to(held.dtype).contiguous()
        self.moved[old] = self.rewriter.constant(made, str(old.target), like=old)
        self.rewriter.replace(old, self.moved[old])

    def group(self) -> Group:
        """The group on what is there now."""
        group = self.product.group
        on = [replace(p, node=self.moved.get(p.node, p.node)) for p in group.constants]
        return replace(group, constants=tuple(on), reads=())
