"""Recover GELU, SiLU, hard-swish, hard-sigmoid, softplus and Mish from the formulas of each.

Rewrite:
    x (1 + erf(x / sqrt 2)) / 2                               ->  gelu(x)
    x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2           ->  gelu(x, approximate="tanh")
    x sigmoid(x),  x / (1 + exp(-x))                          ->  silu(x)
    clamp(x + 3, 0, 6) / 6                                    ->  hardsigmoid(x)
    x clamp(x + 3, 0, 6) / 6,  x hardsigmoid(x)               ->  hardswish(x)
    x tanh(log(1 + exp(x))),  x tanh(softplus(x))             ->  mish(x)
    log(1 + exp(x)),  log1p(exp(x))                           ->  softplus(x), if asked for
    in any order of operands: the formula is read as a polynomial in x and the function of x.
Shapes:       x: any; the result has its shape and dtype
Requires:     constants right to six digits (twelve in float64); nothing in between read elsewhere.
Contract:     exact. Softplus is recovered only where asked for: as written it is infinite once
              exp(x) overflows (x above 88 in float32), where the operator gives x.
Cost:         2 to 9 operators become one.
Failures:     none; what does not fit is refused.
Source:       Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016, sec. 2; Howard et al.,
              "Searching for MobileNetV3", ICCV 2019, sec. 5.2; Misra, "Mish", BMVC 2020, eq. 1.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import aten
from planish.ir.pattern import Match, Refusal, Rule
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Pass, PassContext, PassResult
from planish.passes.fuse.activation_reading import (
    FUNCTIONS,
    Form,
    candidates,
    forms_of,
    logistic_argument,
    softplus_argument,
)
from planish.passes.fuse.algebra import Polynomial, is_polynomial, polynomial
from planish.passes.fuse.matching import (
    dtype_of,
    has_other_user,
    origin,
    outside_user,
    power_of,
    shape_of,
    skip,
)


def written_out(name: str, x: Tensor) -> Tensor:
    """Each activation by its formula; ``name`` is the operator's."""
    formulas = {
        "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "silu": lambda: x * torch.sigmoid(x),
        "hardsigmoid": lambda: (x + 3).clamp(0, 6) / 6,
        "hardswish": lambda: x * (x + 3).clamp(0, 6) / 6,
        "softplus": lambda: torch.log(1 + torch.exp(x)),
        "mish": lambda: x * torch.tanh(torch.log1p(torch.exp(x))),
    }
    return formulas[name]()


class _Found(NamedTuple):
    root: Node
    form: Form
    seen: list[Node]


class Activation(Rule):
    """What the rules here share: guards on the result, and the rewrite."""

    def decide(
        self,
        node: Node,
        x: Node,
        root: Node,
        seen: list[Node],
        target: Any,  # noqa: ANN401 - overloads have no common type
        **options: str,
    ) -> Match | Refusal:
        """A match of ``target(x, **options)`` in place of ``root``, unless a guard objects."""
        if dtype_of(root) != dtype_of(x) or shape_of(root) != shape_of(x):
            return self.refuse(node, "the formula changes the dtype or shape of its argument")
        reader = outside_user(seen, root)
        if reader is not None:
            return self.refuse(node, has_other_user(reader, "an intermediate result"))
        return Match(root, {"x": x, "target": target, "options": options, "seen": seen})

    def rewrite(self, match: Match, rewriter: Rewriter) -> None:
        """One operator in place of the formula."""
        like = [match.root, *match["seen"]]
        new = rewriter.call(match["target"], [match["x"]], match["options"], like=like)
        rewriter.replace(match.root, new)


class Gate(Activation):
    """From the function inside (erf, tanh, sigmoid, clamp), find the formula around it."""

    name = "gate"
    roots = FUNCTIONS

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """The longest formula around ``node`` that is an activation."""
        inside: list[Node] = [node]
        value, forms = forms_of(node, program, inside)
        refusal = None
        for x in candidates(value) if forms else ():
            between = list(inside)
            inner = polynomial(value, (x,), program, between)
            if inner is None:
                continue
            found = _around(node, x, inner, forms, between, program)
            if isinstance(found, _Found):
                form = found.form
                options = {"approximate": form.approximate} if form.approximate else {}
                return self.decide(node, x, found.root, found.seen, form.target, **options)
            refusal = refusal or found
        return self.refuse(node, refusal) if refusal else None


def _around(
    node: Node,
    x: Node,
    inner: Polynomial,
    forms: tuple[Form, ...],
    between: list[Node],
    program: Program,
) -> _Found | str | None:
    """Walk to the users while they are polynomials in x and the function; keep the last hit."""
    best: _Found | str | None = None
    queue, looked, dtype = deque([node]), 0, dtype_of(x)
    if dtype is None or not dtype.is_floating_point:
        return None
    while queue and looked < 8:
        root = queue.popleft()
        looked += 1
        seen = list(between)
        outer = polynomial(root, (x, node), program, seen)
        if outer is None:
            continue
        queue.extend(user for user in root.users if user.op == "call_function")
        for form in forms:
            if not is_polynomial(outer, form.formula, dtype):
                continue
            if is_polynomial(inner, form.inner, dtype):
                best = _Found(root, form, seen)
            elif best is None and (1, 1) in form.formula:
                best = _almost(form, inner)
    return best


def _almost(form: Form, inner: Polynomial) -> str | None:
    """Why a gate of the right form is no activation that has an operator."""
    name = form.target.__name__.partition(".")[0]
    slope = inner.get((1,), 0.0)
    if name == "silu" and inner.keys() == form.inner.keys():
        return f"x * sigmoid({slope:g} x) is QuickGELU, which no single operator computes"
    if inner.keys() != form.inner.keys():
        return None
    shown = " + ".join(f"{c:.6g} x^{power}" for (power,), c in sorted(inner.items()))
    return f"the constants are not those of {name}: its function is of {shown}"


class Softplus(Activation):
    """``log(1 + exp(x)) -> softplus(x)``."""

    name = "softplus"
    roots = frozenset({aten.log.default, aten.log1p.default})

    def __init__(self, wanted: bool):
        self.wanted = wanted

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Read the logarithm inwards."""
        seen: list[Node] = []
        x = softplus_argument(node, program, seen)
        if not isinstance(x, Node):
            return None
        if not self.wanted:
            why = "log(1 + exp(x)) is infinite for large x and softplus is not"
            return self.refuse(node, f"{why}; the option softplus=true accepts that")
        if dtype_of(x) == torch.float64:
            return self.refuse(node, "softplus(x) is x above 20, which is not exact in float64")
        return self.decide(node, x, node, seen, aten.softplus.default)


class Logistic(Activation):
    """``1 / (1 + exp(-x)) -> sigmoid(x)`` and ``x / (1 + exp(-x)) -> silu(x)``."""

    name = "logistic"
    roots = frozenset({aten.reciprocal.default, aten.div.Tensor})

    def match(self, node: Node, program: Program) -> Match | Refusal | None:
        """Read the denominator inwards."""
        seen: list[Node] = []
        alone = power_of(node) == -1.0
        x = logistic_argument(skip(node.args[0 if alone else 1], seen), program, seen)
        if not isinstance(x, Node):
            return None
        if alone:
            return self.decide(node, x, node, seen, aten.sigmoid.default)
        if origin(node.args[0]) is not origin(x):
            return self.refuse(node, "what is divided by 1 + exp(-x) is not x")
        return self.decide(node, x, node, seen, aten.silu.default)


@dataclass(frozen=True, kw_only=True)
class RecoverActivations(Pass):
    """Recover GELU, SiLU, hard-swish and others from their formulas.

    Attributes:
        softplus: also recover softplus, which stays finite where its formula overflows.
    """

    name: ClassVar[str] = "recover-activations"
    contract: ClassVar[Contract] = Contract.EXACT
    source: ClassVar[tuple[str, ...]] = (
        "Hendrycks, Gimpel, Gaussian Error Linear Units, 2016, section 2",
        "Howard et al., Searching for MobileNetV3, ICCV 2019, section 5.2",
        "Misra, Mish: A Self Regularized Non-Monotonic Activation Function, BMVC 2020, equation 1",
    )

    softplus: bool = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Recover every activation."""
        rules = [Gate(), Softplus(self.softplus), Logistic()]
        return self.apply_rules(program, context, rules)
