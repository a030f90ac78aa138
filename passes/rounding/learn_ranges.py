"""Learn the scales of a quantized program, module by module, from its floating-point twin.

Rewrite:
    op(dq(q(x; s_x)), dq(Q; s_w))   ->   the same with s_x e^a, s_w e^b
    a, b minimize |f_n(x_n) - f'_n(x'_n)|^2 over what module n gives, where
    x'_n = lambda x_n + (1 - lambda) (what the quantized modules before give)
    lambda_t = max(1 - t / T0, 0): 1 is teacher forcing, 0 is what the file will read
Shapes:       s_x: []; s_w: [] or [O] or blocks.
Requires:     calibration of two batches or more; a run in which the program was quantized.
Contract:     lossy: a module keeps what it has learned only where its error falls on batches that
              it did not learn from.
Cost:         `steps` times `batch` forward and backward passes of each module; all batches keep
              their live values meanwhile. Nothing at run time.
Failures:     the error of the model's outputs may rise where that of each module falls; nothing
              guards it. Rate and order matter: a rate of 0.02 in place of 0.005, ahead of
              `correct-bias`, took MiniLM from 24 to 10 dB. Measure before you keep it.
              Scales that several values share stay as they are: they belong to no single module.
Source:       Bai et al., "Towards Efficient Post-training Quantization of Pre-trained Language
              Models", NeurIPS 2022 (module-wise reconstruction, teacher forcing); Esser et al.,
              "Learned Step Size Quantization", ICLR 2020, section 2.1 (the derivative by a scale);
              that integers of weights stay, and only their scales move, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.errors import PassError, source_line
from planish.ir.ops import argument
from planish.ir.pattern import Refusal
from planish.ir.program import Program
from planish.ir.rewriter import Rewriter
from planish.passes.base import Contract, Fact, Pass, PassContext, PassResult
from planish.passes.equalize._rows import padding_name
from planish.passes.quantize.ranges import AUTO
from planish.passes.quantize.weights import quantize_bias
from planish.passes.quantize.where import EVERYWHERE, Where
from planish.passes.rounding.modules import Module, integer_biases, modules_of
from planish.passes.rounding.side_by_side import Batch, SideBySide

_RULE = "learn-ranges"
_JUDGED = 4  # every fourth batch is not learned from


def learn_scales(
    module: Module,
    program: Program,
    batches: Sequence[Batch],
    pass_: LearnRanges,
    generator: torch.Generator,
) -> tuple[dict[Node, Tensor], float]:
    """New scales of one module, and by how many decibels its error fell on batches held out."""
    learned = [b for i, b in enumerate(batches) if i % _JUDGED != _JUDGED - 1]
    judged = [b for i, b in enumerate(batches) if i % _JUDGED == _JUDGED - 1] or [learned.pop()]
    old = {}
    for scale in module.scales:
        value = program.constant(scale)
        assert value is not None  # modules_of looked
        old[scale] = value
    moves = {scale: torch.zeros_like(value, requires_grad=True) for scale, value in old.items()}
    energy = [
        sum(float(b.kept(i, b.targets[i]).square().mean()) for b in learned) / len(learned)
        for i in range(len(module.outputs))
    ]

    def error(batch: Batch, share: float, scales: Mapping[Node, Tensor]) -> Tensor:
        given = module.compute(batch.mixed(share), program, scales)
        parts = [
            batch.kept(i, given[i] - batch.targets[i]).square().mean() / max(e, 1e-30)
            for i, e in enumerate(energy)
        ]
        return torch.stack(parts).sum()

    optimizer = torch.optim.Adam(list(moves.values()), lr=pass_.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(pass_.steps, 1))
    for step in range(pass_.steps):
        optimizer.zero_grad()
        drawn = torch.randint(len(learned), (pass_.batch,), generator=generator)
        for index in drawn.tolist():
            scales = {s: old[s] * move.exp() for s, move in moves.items()}
            error(learned[index], pass_.share(step), scales).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        new = {s: (old[s] * move.exp()).detach() for s, move in moves.items()}
        last = pass_.share(pass_.steps)
        before, after = (
            sum(float(error(b, last, scales)) for b in judged) for scales in (old, new)
        )
    return new, float(10 * torch.tensor(max(before, 1e-30) / max(after, 1e-30)).log10())


@dataclass(frozen=True, kw_only=True)
class LearnRanges(Pass):
    """Learn scales of values and weights by the error of modules.

    Attributes:
        products: quantized products in a module; 0 for one module of all.
        forcing: what a module reads while it learns: "teacher" the values of the program before,
            which makes modules independent of each other, "none" those of the quantized modules
            before it, "decay" goes from the first to the second over half of the steps.
        steps: of gradient descent for each module.
        batch: calibration batches that are drawn for a step.
        rate: step size, of the logarithm of a scale.
        padding_mask: the input that is 0 at padding, where errors do not count; "auto" takes one
            called attention_mask, null none.
        where: which products; a module is learned where it has one of them.
    """

    name: ClassVar[str] = "learn-ranges"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    source: ClassVar[tuple[str, ...]] = (
        "Bai et al., Towards Efficient Post-training Quantization of Pre-trained Language Models, "
        "NeurIPS 2022",
        "Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.1",
    )

    products: int = 2
    forcing: Literal["teacher", "decay", "none"] = "decay"
    steps: int = 20
    batch: int = 2
    rate: float = 0.005
    padding_mask: str | None = AUTO
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        if self.products < 0 or self.steps < 1 or self.batch < 1 or self.rate <= 0:
            raise ValueError("steps, batch and rate are above 0, and products is not below")

    def share(self, step: int) -> float:
        """Lambda: how much of what a module reads comes from the program before."""
        if self.forcing == "decay":
            return max(1 - 2 * step / self.steps, 0.0)
        return 1.0 if self.forcing == "teacher" else 0.0

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Learn module after module, then write the scales.

        Raises:
            PassError: nothing is quantized, what was before is not known, or there is one batch.
        """
        self.where.check(program)
        modules = modules_of(program, self.products)
        floating = _twin_program(modules, context)
        assert context.calibration is not None  # required
        if len(context.calibration) < 2:
            raise PassError(
                "there is one batch of calibration, and none to judge by",
                hint="give it more and smaller batches",
            )
        mask = padding_name(program, self.padding_mask)
        walk = SideBySide(program, floating, modules, context.calibration, mask)
        seed = int(torch.randint(2**31, (), generator=context.generator))
        rewriter, refusals = Rewriter(program, self.name, context.sites), list[Refusal]()
        for index, module in enumerate(modules):
            context.tell(index, len(modules))
            root = module.products[0] if module.products else module.first
            batches = walk.enter(index)
            if not module.scales or not any(self.where.takes(n) for n in module.products):
                continue
            generator = torch.Generator().manual_seed(seed + index)
            new, gain = learn_scales(module, program, batches, self, generator)
            biases = _biases(module, program, new)
            reason = "the integers of a bias would not fit" if biases is None else None
            if not gain > 0:
                reason = "what it learned does not hold on batches that it did not learn from"
            if reason is not None:
                refusals.append(Refusal(_RULE, root.name, reason, source_line(root)))
                continue
            assert biases is not None  # else there is a reason
            with rewriter.site(_RULE, root) as allowed:
                if allowed:
                    walk.quantized.redo(_write(rewriter, module, new, biases))
                    rewriter.note(f"{len(new)} scales: {gain:+.2f} dB")
        context.tell(len(modules), len(modules))
        return PassResult(rewriter.finish(), tuple(rewriter.changes), tuple(refusals))


def _twin_program(modules: Sequence[Module], context: PassContext) -> Program:
    if not any(module.scales for module in modules):
        raise PassError(
            "nothing is quantized by scales of its own, so there are none to learn",
            hint="run it behind quantize",
        )
    if context.float_program is None:
        raise PassError(
            "the program came to it quantized, so what it computed in floating point is not known",
            hint="run it in one recipe with quantize, behind it",
        )
    return context.float_program()


def _biases(
    module: Module, program: Program, new: Mapping[Node, Tensor]
) -> dict[Node, tuple[Tensor, Tensor]] | None:
    """Integers and scale of each int32 bias under new scales; None where one does not fit."""
    found = {}
    for node, x, w in integer_biases(module.products, program):
        if x not in new and w not in new:
            continue
        scales = [new[n] if n in new else program.constant(n) for n in (x, w)]
        bias = argument(node, "bias")
        codes, old = (program.constant(n) for n in bias.args[:2])
        assert scales[0] is not None
        assert scales[1] is not None
        assert codes is not None
        assert old is not None
        scale = (scales[0] * scales[1]).reshape(-1).expand(old.shape).contiguous()
        integers = quantize_bias(codes.double() * old.double(), scale)
        if integers is None:
            return None
        found[bias] = integers, scale
    return found


def _write(
    rewriter: Rewriter,
    module: Module,
    new: Mapping[Node, Tensor],
    biases: Mapping[Node, tuple[Tensor, Tensor]],
) -> list[Node]:
    """Write scales and biases; returns what reads them."""
    changed = []
    for scale, value in new.items():
        readers = [n for n in module.nodes if n in scale.users]
        rewriter.insert_before(readers[0])
        node = rewriter.constant(value.contiguous(), str(scale.target), like=scale)
        for reader in readers:
            rewriter.set_args(reader, [reader.args[0], node, *reader.args[2:]], reader.kwargs)
        changed += readers
    for bias, (codes, scale_value) in biases.items():
        rewriter.insert_before(bias)
        parts = [
            rewriter.constant(value, str(old.target), like=old)
            for value, old in zip((codes, scale_value), bias.args[:2], strict=True)
            if isinstance(old, Node)  # both are: _biases looked
        ]
        rewriter.set_args(bias, [*parts, *bias.args[2:]], bias.kwargs)
        changed.append(bias)
    return changed
