"""Which axis of a value counts samples and which count tokens, so that padding can be left out.

Values are compared with the mask by their sizes as the program declares them: with named
dimensions that is certain; of fixed sizes it is read only where one reading is possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import SymInt, Tensor

Dims = tuple[sympy.Expr, ...]

NO_TOKENS = "it has no axis of tokens"
# Pieces of about this many elements stay in the processor's cache.
PIECE = 1 << 18


@dataclass(frozen=True)
class Layout:
    """How a value is cut into samples.

    Attributes:
        sample_axis: the axis of samples in the value as it is; None if there is none.
        inner: that axis holds (samples, this) flattened into one; 1 where it does not.
        token_axes: axes of tokens after the samples were brought to axis 0 and split off.
        problem: why padding cannot be left out although there is a mask; None where it can.
    """

    sample_axis: int | None = None
    inner: sympy.Expr = sympy.S.One
    token_axes: tuple[int, ...] = ()
    problem: str | None = None

    def arranged(self, x: Tensor, samples: int) -> Tensor:
        """The value as [samples, ...]; [1, ...] if it has no axis of samples."""
        if self.sample_axis is None or x.dim() == 0:
            return x.unsqueeze(0)
        x = x.movedim(self.sample_axis, 0)
        if self.inner != 1:
            x = x.unflatten(0, (samples, -1))
        return x

    def axis(self, axis: int, rank: int) -> int | None:
        """Where an axis of the value is in ``arranged``; None if that is (part of) the samples."""
        axis %= rank
        if self.sample_axis is None:
            return axis + 1
        if axis == self.sample_axis:
            return None
        moved = axis + 1 if axis < self.sample_axis else axis
        return moved + 1 if self.inner != 1 else moved

    def pieces(self, x: Tensor, mask: Tensor | None, samples: int) -> Iterator[Tensor]:
        """Parts of a value, each [n, ...] of n whole samples, without padding.

        Args:
            x: the value.
            mask: bool [samples, tokens], true where there is no padding; None keeps all.
            samples: how many samples the batch has.
        """
        x = self.arranged(x, samples)
        if mask is None or not self.token_axes or bool(mask.all()):
            step = max(1, PIECE * x.shape[0] // max(x.numel(), 1))
            yield from (part for part in x.split(step) if part.numel())
            return
        if len(mask) == 1:  # one mask for all samples
            mask = mask.expand(len(x), -1)
        for sample, kept in zip(x.split(1), mask, strict=True):
            where = kept.nonzero().flatten()
            if not len(where):
                continue
            for axis in self.token_axes:
                # Padding usually stands at one end, and a view costs nothing.
                first, count = int(where[0]), len(where)
                if int(where[-1]) - first + 1 == count:
                    sample = sample.narrow(axis, first, count)
                else:
                    sample = sample.index_select(axis, where)
            if sample.numel():
                yield sample


def rows_of(
    held: Layout, x: Tensor, mask: Tensor | None, samples: int, axis: int = -1
) -> Iterator[Tensor]:
    """A value without padding as rows of channels, [n, C] piece by piece.

    Where the layout takes the channels themselves for the samples, which happens where both are of
    one size, nothing can be left out.

    Args:
        held: of the value.
        x: the value, of rank 1 or more.
        mask: as ``Layout.pieces`` takes it.
        samples: likewise.
        axis: of the channels.
    """
    inner = held.axis(axis, x.dim())
    if inner is None:
        yield x.movedim(axis, -1).reshape(-1, x.shape[axis])
        return
    for piece in held.pieces(x, mask, samples):
        yield piece.movedim(inner, -1).reshape(-1, piece.shape[inner])


def dims(declared: Tensor, names: Mapping[str, str]) -> Dims:
    """The sizes of a declared value as expressions over the user's dimension names.

    Args:
        declared: the value.
        names: symbol -> name; torch may give one dimension of the user's a symbol for each input.
    """
    sizes: tuple[Any, ...] = tuple(declared.shape)
    return tuple(
        _named(d.node.expr, names) if isinstance(d, SymInt) else sympy.Integer(d) for d in sizes
    )


def _named(size: sympy.Expr, names: Mapping[str, str]) -> sympy.Expr:
    known = [s for s in size.free_symbols if str(s) in names]
    return size.xreplace(
        {s: sympy.Symbol(names[str(s)], integer=True, positive=True) for s in known}
    )


def layout(value: Dims, batch: sympy.Expr | None, tokens: sympy.Expr | None) -> Layout:
    """Find the axes of samples and tokens.

    Args:
        value: sizes of the value.
        batch: how many samples there are; None if the program has no axis of them.
        tokens: how many tokens the mask speaks of; None without a mask.
    """
    lost = None if tokens is None else "it has no axis of samples"
    if batch is None or not value:
        return Layout(problem=lost)
    inner = _quotient(value[0], batch)
    axis: int | None = 0
    if inner is None:
        axis = next((i for i, size in enumerate(value) if size == batch), None)
        inner = sympy.Integer(1)
    if axis is None:
        return Layout(problem=lost)
    rest = [size for i, size in enumerate(value) if i != axis]
    if inner != 1:
        rest.insert(0, inner)
    if tokens is None:
        return Layout(axis, inner)
    found, problem = _token_axes(rest, tokens)
    return Layout(axis, inner, found, problem)


def _token_axes(rest: list[sympy.Expr], tokens: sympy.Expr) -> tuple[tuple[int, ...], str | None]:
    """Axes of tokens among the sizes behind the samples."""
    found = tuple(i + 1 for i, size in enumerate(rest) if size == tokens)
    if tokens.is_Integer and len(found) > 1 and found[-1] == len(rest):
        # A fixed number of features may equal the number of tokens by chance.
        found = found[:-1]
    if not found:
        return (), NO_TOKENS
    if tokens.is_Integer:
        if len(found) > 1:
            return (), f"several axes of it have size {tokens}: declare dimensions dynamic"
        if found[0] == len(rest) == 2:
            return (), f"its last axis has size {tokens}, which may be features as well as tokens"
    return found, None


def _quotient(size: sympy.Expr, batch: sympy.Expr) -> sympy.Expr | None:
    """``size / batch`` if that is a whole number for every batch."""
    if batch.is_Integer:
        return size / batch if size.is_Integer and size and not size % batch else None
    quotient = sympy.cancel(size / batch)
    return None if quotient.free_symbols & batch.free_symbols else quotient
