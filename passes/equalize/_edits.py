"""Scaling a value in the graph: what makes it, what reads it, and what must not notice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from planish.ir.ops import argument, aten, is_op
from planish.ir.rewriter import Rewriter
from planish.passes.equalize._sites import Site
from planish.passes.fold._layers import with_arguments
from planish.passes.rounding.targets import Weight


def scale_maker(rewriter: Rewriter, maker: Node, factor: Tensor) -> None:
    """Multiply the channels that a norm or linear gives by ``factor`` [C], in its own numbers."""
    rewriter.insert_before(maker)
    program = rewriter.program
    weight, bias = program.constant(argument(maker, "weight")), None
    if not is_op(maker, aten.rms_norm.default):
        bias = program.constant(argument(maker, "bias"))
    exact = factor.double()
    linear = is_op(maker, aten.linear.default)
    new: dict[str, Argument] = {}
    if weight is not None:
        scaled = weight.double() * (exact[:, None] if linear else exact)
        name = str(argument(maker, "weight").target)
        layout = program.layouts.get(name)
        new["weight"] = rewriter.constant(scaled.to(weight.dtype), name, like=maker, layout=layout)
    else:
        name = f"{maker.name}.weight"
        new["weight"] = rewriter.constant(factor.to(maker.meta["val"].dtype), name, like=maker)
    if bias is not None:
        scaled = (bias.double() * exact).to(bias.dtype)
        name = str(argument(maker, "bias").target)
        new["bias"] = rewriter.constant(scaled, name, like=maker)
    args, kwargs = with_arguments(maker, new)
    rewriter.set_args(maker, args, kwargs)


def scale_inputs(rewriter: Rewriter, product: Node, weight: Weight, factor: Tensor) -> None:
    """Multiply the weights of each input channel of a product by ``factor`` [I]."""
    rewriter.insert_before(product)
    scaled = weight.from_rows((weight.rows().double() * factor.double()).to(weight.value.dtype))
    layout = weight.layout
    new = rewriter.constant(scaled, weight.name, like=weight.sources[0], layout=layout)
    redirect(rewriter, product, weight.sources, new)


def multiply(rewriter: Rewriter, root: Node, factor: Tensor, name: str) -> Node:
    """``root * factor`` [C], right behind ``root``."""
    rewriter.insert_before(root.next)
    constant = rewriter.constant(
        factor.to(root.meta["val"].dtype), f"{root.name}.{name}", like=root
    )
    return rewriter.call(aten.mul.Tensor, [root, constant], like=root)


def scale_site(rewriter: Rewriter, site: Site, scale: Tensor) -> None:
    """Divide a value by ``scale`` [I] and multiply what reads it."""
    root = site.root
    if site.maker is not None:
        scale_maker(rewriter, site.maker, 1 / scale)
        if site.outer:
            restored = multiply(rewriter, root, scale, "scale")
            for user in site.outer:
                redirect(rewriter, user, [root], restored)
    else:
        divided = multiply(rewriter, root, 1 / scale, "inverse_scale")
        for user in site.inner:
            redirect(rewriter, user, [root], divided)
    for product, weight in zip(site.products, site.weights, strict=True):
        scale_inputs(rewriter, product, weight, scale)


def redirect(rewriter: Rewriter, user: Node, old: Sequence[Node], new: Node) -> None:
    """Let one user read ``new`` wherever it read one of ``old``."""
    args, kwargs = map_arg((user.args, dict(user.kwargs)), lambda n: new if n in old else n)
    rewriter.set_args(user, args, kwargs)
