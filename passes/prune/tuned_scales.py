"""Scales of what stays of each layer, from the first to the last, each with the tuned ones below.

The program as it was and the one that lost its units are carried along together. What a layer
lacks is compared behind its residual sum, so that what is wrong with the residual is mended too.

Source: Kwon et al., NeurIPS 2022, section 4.3. The unpruned program is the teacher, as in the
paper; the public code has one pruned to half the way instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.ops import aten, is_op
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.observe.feeding import Padding
from planish.passes.observe.feeding import required as required_spool
from planish.passes.observe.layout import NO_TOKENS, rows_of
from planish.passes.prune.fold import columns_of
from planish.passes.prune.groups import Group, Read
from planish.passes.prune.tuning import Moments, normal_equations, scales
from planish.passes.rounding.lockstep import Lockstep


def problem(group: Group) -> str | None:
    """Why a group's units cannot be tuned; None where they can."""
    if len(group.reads) != 1:
        return f"its units are read {len(group.reads)} times, and one scale serves one read"
    read = group.reads[0]
    value = read.value.node.meta["val"]
    if read.weight is None or read.weight.node.meta["val"].dim() != 2:
        return "no matrix of constants reads its units"
    if read.value.axis != value.dim() - 1:
        return "its units do not lie along the last axis"
    return None


@dataclass
class _Rows:
    """Tokens of values, padding left out."""

    padding: Padding
    masks: list[tuple[int, Tensor | None]]

    def of(self, node: Node, value: Tensor, batch: int) -> Iterator[Tensor]:
        """``[tokens, features]`` of one batch, in one or several pieces."""
        samples, mask = self.masks[batch]
        layout = self.padding.layout(node)
        if mask is None or layout.problem == NO_TOKENS:
            yield value.reshape(-1, value.shape[-1])
        else:
            yield from rows_of(layout, value, mask, samples)


def tuned_scales(
    program: Program,
    kept: Mapping[Group, Tensor],
    context: PassContext,
    *,
    damping: float,
    padding_mask: str,
) -> dict[Group, Tensor | None]:
    """``r [kept]`` of each group; None where the solution is not to be trusted.

    Args:
        program: with all units; is not changed.
        kept: units that stay, of groups without a ``problem``, in any order. Of groups that have
            one, too, so that their units are missing meanwhile.
        context: holds the calibration; told of every layer.
        damping: ridge, as a share of the mean of the diagonal.
        padding_mask: input that is 0 for padding, or "".

    Raises:
        RequirementError: there is no calibration.
    """
    required_spool(context.calibration)
    assert context.calibration is not None
    padding = Padding.of(program, padding_mask or None)
    masks = [padding.read(x) if padding_mask else (1, None) for x in context.calibration]
    student = program.clone()
    twin = dict(zip(program.graph.nodes, student.graph.nodes, strict=True))
    for group, units in kept.items():
        for read in group.reads:
            _set(student, read, group.size, units, None)
    before = Lockstep(program, context.calibration, padding_mask)
    after = Lockstep(student, context.calibration, padding_mask)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    tuned = [g for g in kept if problem(g) is None]
    tuned.sort(key=lambda g: order[g.reads[0].reader])
    result: dict[Group, Tensor | None] = {}
    for done, group in enumerate(tuned):
        context.tell(done, len(tuned))
        pair = _Pair(before, after, twin, _Rows(padding, masks))
        result[group] = pair.tune(program, student, group, kept[group], damping)
    return result


@dataclass
class _Pair:
    """The teacher and the student, at the layers that are being tuned."""

    before: Lockstep
    after: Lockstep
    twin: Mapping[Node, Node]
    rows: _Rows

    def tune(
        self, program: Program, student: Program, group: Group, units: Tensor, damping: float
    ) -> Tensor | None:
        """The scales of one layer, which the student has from then on."""
        read = group.reads[0]
        assert read.weight is not None  # problem() has looked
        out = _behind(read.reader)
        steps = [read.weight.node, read.reader] + ([out] if out is not read.reader else [])
        own = [self.twin[n] for n in steps]
        wanted = {self.twin[read.value.node], *own, *(o for n in own for o in n.all_input_nodes)}
        self.before.kept.add(out)
        self.after.kept |= wanted
        self.before.advance(out.next)
        self.after.advance(self.twin[out].next)
        moments = self._moments(read, out)
        weight = program.constant(read.weight.node)
        columns = columns_of(read.value, group.size)
        assert weight is not None
        assert columns is not None
        matrix = weight if read.weight.axis == 1 else weight.T
        square, right = normal_equations(moments, matrix, columns[units])
        ridge = damping * float(square.diagonal().mean())
        r = scales(square, right, ridge)
        if r is not None:
            _set(student, read, group.size, units, r)
            self.after.redo(own)
            self.after.advance(self.twin[out].next)
        self.before.release([out])
        self.after.release(wanted)
        return r

    def _moments(self, read: Read, out: Node) -> Moments:
        x, mine = self.twin[read.value.node], self.twin[out]
        teacher = self.before.values([out])
        found: Moments | None = None
        for batch, values in enumerate(self.after.values([x, mine])):
            lacking = teacher[batch][out] - values[mine]
            pieces = zip(
                self.rows.of(read.value.node, values[x], batch),
                self.rows.of(out, lacking, batch),
                strict=True,
            )
            for tokens, lacks in pieces:
                part = Moments.of(tokens, lacks)
                found = part if found is None else found + part
        assert found is not None  # a spool has batches
        return found


def _behind(reader: Node) -> Node:
    """The residual sum that a layer's output goes into, else the layer."""
    users = list(reader.users)
    if len(users) == 1 and is_op(users[0], aten.add.Tensor) and not users[0].kwargs:
        others = [n for n in users[0].all_input_nodes if n is not reader]
        same = users[0].meta["val"].shape == reader.meta["val"].shape
        if len(others) == 1 and same:
            return users[0]
    return reader


def _set(student: Program, read: Read, size: int, units: Tensor, r: Tensor | None) -> None:
    """Zero the columns of the units that go, and scale those that stay."""
    if read.weight is None:
        return
    name = str(read.weight.node.target)
    factors = torch.zeros(size, dtype=torch.float64)
    factors[units] = 1.0 if r is None else r
    each = torch.where(read.weight.unit >= 0, factors[read.weight.unit.clamp_min(0)], 1.0)
    weight = student.constants[name]
    assert isinstance(weight, Tensor)  # it is of two axes
    shape = [1] * weight.dim()
    shape[read.weight.axis] = -1
    student.constants[name] = (weight.double() * each.view(shape)).to(weight.dtype)
