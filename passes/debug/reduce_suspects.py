"""Nodes near which a failure is likely to sit: where the search for a smaller program begins.

A hint only: a wrong one costs tries, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from planish.ir.changes import Change, SiteCounter
from planish.ir.compare import bound_of
from planish.ir.errors import PlanishError
from planish.ir.program import Program
from planish.passes.base import PassContext, PassResult
from planish.passes.debug.bundle import Bundle
from planish.passes.debug.reduce_steps import only_sample
from planish.passes.debug.reduce_values import Recorded
from planish.passes.debug.target_timer import target_timer
from planish.passes.pipeline import run_pipeline
from planish.passes.steps import Instrument, Step

_WORD = re.compile(r"[A-Za-z_]\w*")
_WRONG = 2  # the first values that differ; those after them may only inherit it


def suspects(bundle: Bundle, error: BaseException) -> list[str]:
    """Names of nodes of the bundle's program, the likeliest first.

    They are the first rewritten nodes whose values differ, those whose rewrites made a node that
    the error names, and the nodes that the error names itself.
    """
    words = _WORD.findall(f"{bundle.failure.message}\n{error}")
    if bundle.facts.stage != "pass" or bundle.failure.kind not in ("contract", "verifier"):
        return words
    found = _rewritten(bundle)
    if found is None:
        return words
    after, changes = found
    named = set(words)
    makers = [c.node for c in changes if named.intersection(c.added)]
    return [*_diverging(bundle.program, after, changes), *makers, *words]


class _Keep(Instrument):
    """Keeps what a pass returned, sound or not."""

    result: PassResult | None = None

    def after_pass(self, step: Step, result: PassResult) -> None:
        """Keep it."""
        self.result = result


def _rewritten(bundle: Bundle) -> tuple[Program, tuple[Change, ...]] | None:
    """What the failing pass makes of the program, unchecked; None where it makes nothing."""
    recipe, sites = bundle.recipe, bundle.facts.sites
    kept = _Keep()
    context = PassContext(
        target=recipe.target or "onnx",
        generator=torch.Generator().manual_seed(recipe.seed),
        sites=SiteCounter(sites.limit, sites.count, frozenset(sites.excluded)),
        timer=target_timer(recipe.target or "onnx"),
    )
    try:
        run_pipeline(bundle.program, replace(recipe, passes=recipe.passes[:1]), context, [kept])
    except PlanishError:  # it wants calibration data, or what it returned is no result
        return None
    return (kept.result.program, kept.result.changes) if kept.result is not None else None


def _diverging(before: Program, after: Program, changes: Iterable[Change]) -> list[str]:
    """The first nodes, in order of computation, whose stand-ins have other values."""
    if not before.samples:
        return []
    claimed = {a: b for c in changes for a, b in c.replaced}
    new = {n.name for n in after.operators}
    # Where one node stands for several that went away, it is the last whose value it has.
    last = {claimed[n.name]: n.name for n in before.operators if claimed.get(n.name) in new}
    pairs = {a: b for b, a in last.items()}
    try:
        mine = Recorded(only_sample(before, 0)).of(pairs.keys())
        theirs = Recorded(only_sample(after, 0)).of(set(pairs.values()))
    except PlanishError:  # what the pass made does not run
        return []
    ordered = [n.name for n in before.operators if n.name in pairs]
    wrong = (n for n in ordered if _differ(mine[n], theirs[pairs[n]]))
    return list(islice(wrong, _WRONG))


def _differ(expected: tuple[object, ...], found: tuple[object, ...]) -> bool:
    for b, a in zip(expected, found, strict=True):
        if not isinstance(b, Tensor) or not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return True
        if b.numel() and b.is_floating_point():
            scale = max(float(b.abs().max()), 1e-6)
            if not float((a - b).abs().max()) <= bound_of(b) * scale:  # NaN differs
                return True
        elif not torch.equal(a, b):
            return True
    return False
