"""What every layer reads, while the ones before it are factored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from planish.ir.errors import PassError
from planish.ir.ops import argument, aten, is_op
from planish.ir.program import Program
from planish.passes.base import PassContext
from planish.passes.factorize.factors import Moments
from planish.passes.factorize.sites import Site, pair
from planish.passes.observe.feeding import Padding, required
from planish.passes.rounding.lockstep import Lockstep, operand_key
from planish.passes.rounding.targets import CONVOLUTIONS


class Reading:
    """Moments of one layer after another, in program order.

    Args:
        program: may be edited behind the point reached.
        context: holds the calibration.
        before: the program as it was, whose outputs are to be met; None where only what is read
            now counts.
        padding_mask: input that is 0 for padding, or "".

    Raises:
        RequirementError: there is no calibration.
    """

    def __init__(
        self,
        program: Program,
        context: PassContext,
        *,
        before: Program | None = None,
        padding_mask: str = "",
    ):
        required(context.calibration)
        assert context.calibration is not None
        batches = context.calibration
        self._batches = batches
        self._padding = Padding.of(program, padding_mask or None)
        self._now = Lockstep(program, batches, padding_mask)
        self._before = None if before is None else Lockstep(before, batches, padding_mask)
        self._twins = {} if before is None else {n.name: n for n in before.operators}
        self._last: tuple[object, Moments] | None = None

    def of(self, site: Site) -> Moments:
        """What a layer reads. Layers must be asked for in program order.

        Raises:
            PassError: no input reaches the layer, or a value is not finite.
        """
        reader = site.reader
        key = operand_key(reader)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        self._now.advance(reader)
        twin = None
        if self._before is not None:
            twin = self._twins[reader.name]
            self._before.advance(twin)
        now = self._inputs(self._now, site, reader)
        before = None
        if twin is not None and self._before is not None:
            before = self._inputs(self._before, site, twin)
        drifts = None if twin is None else self._drifts(reader)
        found = moments(now, reader, before, drifts)
        # What a layer adds to is its own, and so are its moments then.
        self._last = (key, found) if drifts is None else None
        return found

    def _drifts(self, reader: Node) -> Iterator[Tensor] | None:
        """How far what a linear's output is added to is from what it was; None where it is not."""
        added = _added_to(reader)
        if added is None or added.name not in self._twins or self._before is None:
            return None
        pairs = zip(
            self._before.tokens_of(self._twins[added.name]),
            self._now.tokens_of(added),
            strict=True,
        )
        return (old[0].float() - new[0].float() for old, new in pairs)

    def _inputs(self, lockstep: Lockstep, site: Site, reader: Node) -> Iterator[Tensor]:
        """What the first factor reads."""
        if site.form != "spatial":
            return lockstep.inputs_of(reader)
        source = reader.args[0]
        assert isinstance(source, Node)
        return (_columns(reader, values[source]) for values in lockstep.values([source]))

    def counts(self, site: Site) -> Tensor:
        """How often each row of a table is looked up; one half more for all, so that none is free.

        Padding is left out, but not where all samples look up the same, as positions.

        Raises:
            PassError: no input reaches the table.
        """
        reader = site.reader
        self._now.advance(reader)
        indices = reader.args[1]
        assert isinstance(indices, Node)
        counts = torch.full((len(site.weight.value),), 0.5, dtype=torch.float64)
        layout = self._padding.layout(indices)
        for values, inputs in zip(self._now.values([indices]), self._batches, strict=True):
            found, (samples, mask) = values[indices], self._padding.read(inputs)
            kept = [found]
            if mask is not None and layout.problem is None:
                kept = list(layout.pieces(found, mask, samples))
            for piece in kept:
                counts += torch.bincount(piece.flatten().long(), minlength=len(counts))
        return counts


def _added_to(reader: Node) -> Node | None:
    """What a linear's output is added to and nothing else, if that is computed before it."""
    users = list(reader.users)
    if len(users) != 1 or not is_op(users[0], aten.add.Tensor) or users[0].kwargs:
        return None
    if is_op(reader, *CONVOLUTIONS, aten.embedding.default):
        return None
    others = [a for a in users[0].args if a is not reader]
    if len(others) != 1 or not isinstance(others[0], Node) or others[0].op != "call_function":
        return None
    other = others[0]
    if other.meta["val"].shape != reader.meta["val"].shape:
        return None
    node = reader.prev
    while node.op != "root":  # computed by the time that the layer is reached
        if node is other:
            return other
        node = node.prev
    return None


def moments(
    pieces: Iterator[Tensor],
    reader: Node,
    before: Iterator[Tensor] | None = None,
    drifts: Iterator[Tensor] | None = None,
) -> Moments:
    """Second moments and means of what a layer reads.

    Args:
        pieces: ``[1, tokens, inputs]`` each.
        reader: named in errors.
        before: the same tokens in the program before, or None.
        drifts: what a sum that the layer goes into has lost at these tokens, or None.

    Raises:
        PassError: there is no token, or a value is not finite.
    """
    rows = 0
    sums: list[Tensor] = []
    # A mean that is large against the deviations would leave nothing of them in 32 bits, so all is
    # summed up as seen from the mean of the first piece, and moved back in 64 bits.
    origin: list[Tensor] = []
    for piece in pieces:
        read = [_real(piece[0]), *([] if before is None else [_real(next(before)[0])])]
        origin = origin or [value.mean(0) for value in read]
        x, *olds = (value - at for value, at in zip(read, origin, strict=True))
        parts = [x.t() @ x, x.sum(0)]
        for old in olds:
            parts += [old.t() @ x, old.sum(0)]
        if drifts is not None:
            drift = next(drifts)
            parts += [drift.t() @ x, drift.sum(0)]
        added = [p.double() for p in parts]
        sums = added if not sums else [a + b for a, b in zip(sums, added, strict=True)]
        rows += len(x)
    if not rows:
        raise PassError("no calibration input reaches this layer", where=reader)
    if not all(bool(s.isfinite().all()) for s in sums):
        raise PassError("the inputs of this layer are not all finite", where=reader)
    means = [s / rows for s in sums[1::2]]
    off, at = means[0], [value.double() for value in origin]
    shifts = [(off, at[0]), *zip(means[1:], at[1:], strict=False)]  # of x, of x0; none of a drift
    shifts += [(m, torch.zeros_like(m)) for m in means[len(shifts) :]]
    products = [
        s / rows + torch.outer(m, at[0]) + torch.outer(a, off + at[0])
        for s, (m, a) in zip(sums[::2], shifts, strict=True)
    ]
    moved = [m + a for m, a in shifts]
    if before is None:
        return Moments(products[0], moved[0], rows=rows)
    lost = [] if drifts is None else [products[2], moved[2]]
    return Moments(products[0], moved[0], products[1], moved[1], rows, *lost)


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _columns(reader: Node, x: Tensor) -> Tensor:
    """What one column of a convolution's window reads, [1, places, channels * rows].

    The places are those of the convolution of one column that comes first of two.
    """
    weight = reader.args[1]
    assert isinstance(weight, Node)
    rows = int(weight.meta["val"].shape[2])
    stride, padding, dilation = (
        pair(argument(reader, name))[0] for name in ("stride", "padding", "dilation")
    )
    x = F.pad(x if x.dim() == 4 else x.unsqueeze(0), (0, 0, padding, padding))
    x = x.unfold(2, dilation * (rows - 1) + 1, stride)[..., ::dilation]
    return x.permute(0, 2, 3, 1, 4).flatten(0, 2).flatten(1).unsqueeze(0)


def few_rows(found: Sequence[tuple[Site, Moments]]) -> str | None:
    """A remark on layers that saw fewer rows than they have inputs."""
    few = [(s, m.rows) for s, m in found if m.rows < s.rows.shape[1]]
    if not few:
        return None
    site, rows = few[0]
    return (
        f"{len(few)} layers saw fewer rows than they have inputs ({site.name}: {rows} for "
        f"{site.rows.shape[1]}): what these rows do not span counts for next to nothing, so "
        "calibrate with more"
    )
