"""Take the loudest features out of a product that will be quantized, and add them in float.

Rewrite:
    x W^T + b   ->   (x m) (W m)^T + b + sum_j x_j W_:,j,   j over the outliers, m = 0 there, else 1
Shapes:       x: [.., I]; W: [O, I]; m: [I].
Requires:     calibration, for max|x_j|; constant weights that nothing else reads.
Contract:     exact: both sums together hold every term once.
Cost:         one multiplication by m, and for each product its [.., k, O] side terms, which are
              elementwise in float: `quantize` leaves them so.
Failures:     more than `max_features` outliers are refused: the side product would cost what the
              integers save. An outlier that calibration never saw is clipped.
Source:       Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
              NeurIPS 2022, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import source_line
from planish.ir.ops import aten
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._edits import multiply, redirect, scale_inputs
from planish.passes.equalize._rows import sample_rows
from planish.passes.equalize._sites import Site, find_sites
from planish.passes.quantize.ranges import AUTO
from planish.passes.quantize.where import EVERYWHERE, Where
from planish.passes.rounding.targets import Weight, find_weights

_RULE = "split-outliers"


def outlier_features(absmax: Tensor, threshold: float) -> Tensor:
    """The indices of features that reach the threshold.

    Args:
        absmax: [I], the largest absolute value of each.
        threshold: from where on a feature is an outlier.
    """
    return (absmax >= threshold).nonzero().flatten()


def split_product(x: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` and ``weight`` without the features, and what these alone give.

    Args:
        x: [.., I].
        weight: [O, I].
        features: [k].

    Returns:
        [.., I] and [O, I] with zeros there, and [.., O].
    """
    keep = torch.ones(weight.shape[1], dtype=weight.dtype)
    keep[features] = 0
    side = (x[..., features].unsqueeze(-1) * weight[:, features].t()).sum(-2)
    return x * keep, weight * keep, side


@dataclass(frozen=True, kw_only=True)
class SplitOutliers(Pass):
    """Compute products with outlier features in floating point beside the others.

    Attributes:
        threshold: features whose absolute value ever reaches it are outliers.
        max_features: values with more outliers stay as they are.
        padding_mask: the input that is 0 at padding, where outliers do not count; "auto" takes one
            called attention_mask, null none.
        where: which products.
    """

    name: ClassVar[str] = "split-outliers"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = ("Dettmers et al., LLM.int8(), NeurIPS 2022, section 3.2",)

    threshold: float = 6.0
    max_features: int = 8
    padding_mask: str | None = AUTO
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        if self.threshold <= 0 or self.max_features < 1:
            raise ValueError("threshold is positive and max_features at least 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Look at all values once, and split the products on those with a few outliers."""
        weights, refusals = find_weights(program, embeddings=False, where=self.where)
        sites = find_sites(program, weights)
        seen = sample_rows(
            program,
            [site.root for site in sites],
            context.calibration,
            1,
            context.generator,
            padding_mask=self.padding_mask,
            tell=context.tell,
        )
        rewriter = Rewriter(program, self.name, context.sites)
        for site in sites:
            features = outlier_features(seen[site.root].absmax, self.threshold)
            reason = None
            if not len(features):
                reason = f"none of its features reaches {self.threshold:g}"
            elif len(features) > self.max_features:
                reason = f"{len(features)} of its features are outliers, over {self.max_features}"
            elif any(user not in site.products for user in site.inner):
                reason = "its products read it through a view"
            if reason is not None:
                refusals.append(Refusal(_RULE, site.root.name, reason, source_line(site.root)))
                continue
            with rewriter.site(_RULE, site.root) as allowed:
                if allowed:
                    _split(rewriter, site, features)
                    shown = ", ".join(str(int(j)) for j in features)
                    rewriter.note(f"features {shown} of {site.root.name} in float")
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


def _split(rewriter: Rewriter, site: Site, features: Tensor) -> None:
    root, products = site.root, zip(site.products, site.weights, strict=True)
    keep = torch.ones(root.meta["val"].shape[-1], dtype=torch.float64)
    keep[features] = 0
    quiet = multiply(rewriter, root, keep, "quiet")
    index = rewriter.constant(features, f"{root.name}.outliers", like=root)
    loud = rewriter.call(aten.index_select.default, [root, -1, index], like=root)
    loud = rewriter.call(aten.unsqueeze.default, [loud, -1], like=root)
    for product, weight in products:
        columns = weight.rows()[:, features].t().contiguous()
        redirect(rewriter, product, [root], quiet)
        scale_inputs(rewriter, product, weight, keep)
        _add_side(rewriter, product, weight, loud, columns)


def _add_side(
    rewriter: Rewriter, product: Node, weight: Weight, loud: Node, columns: Tensor
) -> None:
    """``product + sum_j x_j W_:,j``, read by all that read the product."""
    rewriter.insert_before(product.next)
    stem = weight.name.removesuffix(".weight")
    constant = rewriter.constant(columns, f"{stem}.outlier_weight", like=product)
    terms = rewriter.call(aten.mul.Tensor, [loud, constant], like=product)
    side = rewriter.call(aten.sum.dim_IntList, [terms, [-2]], like=product)
    rewriter.replace(product, rewriter.call(aten.add.Tensor, [product, side], like=product))
