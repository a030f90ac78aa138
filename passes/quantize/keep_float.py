"""Mixed precision: leave the fewest operators in floating point that a bound on the error asks for.

    y = op(dequantize(quantize(v)), dequantize(@w_q))    becomes    y = op(v, @w)

Every quantized operator is ranked by the error that it alone makes at the outputs
(``passes.quantize.sensitivity``: one sweep over the calibration inputs). The k worst go back to
floating point, where k is the smallest number with which the outputs keep the bound; it is found
by bisection, each step measured on calibration inputs that no range was taken from. Then those
kept are tried the other way, the least of them first: what can be quantized after all, is. A bound
that cannot be kept with anything in integers is an error that gives the best that was reached.

Preconditions: ``quantize`` (or a rounding pass) ran before, in the same recipe: the weights in
floating point are those of the program from before. Contract: lossy, as everything about
quantization, though it takes error away. Cost: one forward and four backward passes for each of
``batches`` calibration inputs, and about ``log2(operators) + 8`` runs over ``judged`` held-out
ones.

Sources: Wu et al., "Integer Quantization for Deep Learning Inference", 2020, section 6.2 (partial
quantization by sensitivity); ranking as in ``passes.quantize.sensitivity``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import ClassVar

from planish.ir.errors import BoundError, MisusedPassError, RequirementError
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, OperatorError, Pass, PassContext, PassResult
from planish.passes.quantize.one_by_one import alone, counted
from planish.passes.quantize.outputs import Batch, Judge, Padding, Score
from planish.passes.quantize.ranges import AUTO, padding_input
from planish.passes.quantize.restore import quantized_operators, restore
from planish.passes.quantize.search import RETRIES, fewest
from planish.passes.quantize.sensitivity import NotDerivableError, sensitivities
from planish.passes.quantize.where import NoSuchOperatorError, Where
from planish.passes.spec import suggestion


def kept_in_float(program: Program, floating: Program, names: Sequence[str]) -> Program:
    """A copy of a quantized program with some of its operators in floating point.

    Args:
        program: stays as it is.
        floating: the program from before it was quantized.
        names: of operators; those that cannot be restored stay quantized.
    """
    rewriter = Rewriter(program.clone(), "keep-float")
    restore(rewriter, floating, names)
    return rewriter.finish()


@dataclass(frozen=True, kw_only=True)
class KeepFloat(Pass):
    """Leave the fewest operators in floating point with which the outputs keep a bound.

    Attributes:
        min_sqnr_db: signal to noise of the outputs, in decibels; of several outputs the worst.
        min_cosine: cosine similarity of the outputs; of several outputs the worst.
        min_metric: mean of the user's metric, as ``optimize(metric=...)`` takes it.
        max_operators: keep at most so many in floating point.
        operators: keep these in any case: names, operators or module paths, with ``*``. Where
            nothing else is given, nothing is measured.
        batches: calibration inputs to rank by. Four, with four projections each, give the error of
            an operator to about 1.5 dB.
        judged: held-out inputs to decide by.
        padding_mask: the input that is 0 where there is padding, which then counts nowhere; "auto"
            takes an ``attention_mask``.
    """

    name: ClassVar[str] = "keep-float"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    holds_out: ClassVar[bool] = True
    source: ClassVar[tuple[str, ...]] = (
        "Wu et al., Integer Quantization for Deep Learning Inference, 2020, section 6.2",
        "Dong et al., HAWQ-V2, NeurIPS 2020",
    )

    min_sqnr_db: float | None = None
    min_cosine: float | None = None
    min_metric: float | None = None
    max_operators: int | None = None
    operators: tuple[str, ...] = ()
    batches: int = 4
    judged: int = 16
    padding_mask: str | None = AUTO

    def __post_init__(self) -> None:
        if self.batches < 1 or self.judged < 1:
            raise ValueError(f"{min(self.batches, self.judged)} batches measure nothing")
        if self.max_operators is not None and self.max_operators < 0:
            raise ValueError(f"max_operators is {self.max_operators}")

    def needs(self) -> frozenset[Fact]:
        """Calibration, to hold a bound; named operators need none."""
        return self.requires if self.bounded else frozenset()

    @property
    def bounded(self) -> bool:
        """Whether there is anything to measure."""
        return any(b is not None for b in (self.min_sqnr_db, self.min_cosine, self.min_metric))

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rank, choose, restore.

        Raises:
            MisusedPassError: nothing was asked for, or the weights in floating point are not known.
            BoundError: the bound cannot be kept with anything in integers.
            RequirementError: a bound needs a metric that is not there.
        """
        if not (self.bounded or self.operators):
            raise MisusedPassError(
                "it has no bound to keep",
                hint="give min_sqnr_db, min_cosine or min_metric, or name the operators",
            )
        quantized = [node.name for node in quantized_operators(program)]
        if not quantized:
            context.remark("nothing is quantized: there is nothing to keep in floating point")
            return PassResult(program)
        if context.float_program is None:
            raise MisusedPassError(
                "the program came to it quantized, so its weights in floating point are not known",
                hint="run it in one recipe with quantize, behind it",
            )
        floating = context.float_program()
        chosen = fixed = self._fixed(program)
        errors: tuple[OperatorError, ...] = ()
        if self.bounded:
            chosen, errors = self._choose(program, floating, fixed, context)
        rewriter = Rewriter(program, self.name, context.sites)
        done, refusals = restore(rewriter, floating, chosen)
        errors = tuple(replace(e, kept_float=e.node in done) for e in errors)
        return PassResult(rewriter.finish(), tuple(rewriter.changes), refusals, errors)

    def _fixed(self, program: Program) -> tuple[str, ...]:
        """The quantized operators that the options name."""
        nodes = quantized_operators(program)
        for pattern in self.operators:
            if not any(Where(include=(pattern,)).takes(node) for node in nodes):
                raise NoSuchOperatorError(
                    f"operators holds {pattern!r}, which no quantized operator answers to",
                    hint=suggestion(pattern, [n.name for n in nodes], "operators"),
                )
        chosen = Where(include=self.operators)
        return tuple(n.name for n in nodes if self.operators and chosen.takes(n))

    def _choose(
        self, program: Program, floating: Program, fixed: tuple[str, ...], context: PassContext
    ) -> tuple[tuple[str, ...], tuple[OperatorError, ...]]:
        """Which operators to restore, and the errors of all."""
        ranges, held_out = self._batches(context)
        mask = padding_input(program) if self.padding_mask == AUTO else self.padding_mask
        padding = Padding.named(program, mask)
        rewriter = Rewriter(program.clone(), self.name)
        names, _ = restore(rewriter, floating, [n.name for n in quantized_operators(program)])
        restored = rewriter.finish()
        steps = len(ranges) + 2 + len(names).bit_length() + RETRIES  # as many scores at most
        told = partial(counted, ranges, context.tell, steps)
        try:
            errors = sensitivities(
                restored, program, names, told(), generator=context.generator, padding=padding
            )
        except NotDerivableError:
            errors = alone(restored, program, names, told(), padding=padding)
        judge = Judge(floating, held_out, padding, context.metric, context.labeled)
        scores: dict[frozenset[str], Score] = {}

        def score(kept: Sequence[str]) -> Score:
            key = frozenset((*fixed, *kept))
            if key not in scores:
                context.tell(min(len(ranges) + len(scores), steps), steps)
                scores[key] = judge.score(kept_in_float(program, floating, (*fixed, *kept)))
            return scores[key]

        order = [e.node for e in errors if e.node not in fixed]
        limit = max(0, len(order) if self.max_operators is None else self.max_operators)
        found = fewest(order[:limit], lambda kept: self.holds(score(kept)))
        kept = tuple(order[:limit]) if found is None else found
        before, after = score(()), score(kept)
        context.tell(steps, steps)
        summary = (
            f"{len(fixed) + len(kept)} of {len(names)} quantized operators stay in floating point: "
            f"{after} on {len(held_out)} batches; all of them quantized: {before}"
        )
        everything = len(quantized_operators(program))
        if found is None or len(fixed) < len(fixed) + len(kept) == everything:
            raise self._missed(scores, everything, before, len(held_out))
        context.remark(summary)
        return (*fixed, *kept), errors

    def _missed(
        self, scores: Mapping[frozenset[str], Score], operators: int, before: Score, batches: int
    ) -> BoundError:
        """The error that the bound cannot be kept, with the nearest that was reached."""
        limit = "with anything in integers"
        if self.max_operators is not None:
            limit = f"with at most {self.max_operators} operators in floating point"
        tried = {kept: score for kept, score in scores.items() if len(kept) < operators} or scores
        best = max(tried, key=lambda kept: self._nearness(tried[kept]))
        return BoundError(
            f"the bound ({self.bounds}) cannot be kept {limit}: the best reached "
            f"is {tried[best]} on {batches} batches, with {len(best)} of {operators} "
            f"quantized operators in floating point; all of them quantized: {before}",
            hint="ask for no more than that, let more operators stay in floating point, or lower "
            "the error first: more calibration inputs, smooth-quant, correct-bias",
        )

    def _nearness(self, score: Score) -> tuple[float, ...]:
        """What is to be as large as possible, the first bound first."""
        found = (score.fidelity.sqnr_db, score.fidelity.cosine, score.metric)
        bounds = (self.min_sqnr_db, self.min_cosine, self.min_metric)
        return tuple(
            number
            for bound, number in zip(bounds, found, strict=True)
            if bound is not None and number is not None
        )

    def _batches(self, context: PassContext) -> tuple[list[Batch], list[Batch]]:
        """Inputs to rank by, and inputs to decide by."""
        assert context.calibration is not None  # needs() says so
        if self.min_metric is not None and context.metric is None:
            raise RequirementError(
                "min_metric needs a metric", hint="pass metric=... : metric(outputs, reference)"
            )
        ranges: list[Batch] = list(islice(context.calibration, self.batches))
        if context.held_out is None:
            context.remark("no calibration batch is held out: the bound was judged on those used")
            return ranges, list(islice(context.calibration, self.judged))
        return ranges, list(islice(context.held_out, self.judged))

    def holds(self, score: Score) -> bool:
        """Whether outputs of this score keep the bound."""
        pairs = (
            (self.min_sqnr_db, score.fidelity.sqnr_db),
            (self.min_cosine, score.fidelity.cosine),
            (self.min_metric, score.metric),
        )
        return all(low is None or (got is not None and got >= low) for low, got in pairs)

    @property
    def bounds(self) -> str:
        """The bound as text: ``min_sqnr_db 12``."""
        found = [(n, getattr(self, n)) for n in ("min_sqnr_db", "min_cosine", "min_metric")]
        return ", ".join(f"{name} {value:g}" for name, value in found if value is not None)
