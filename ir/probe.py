"""The second probe: other inputs a program must agree on, at other legal sizes.

A rewrite may hold for the sample and for nothing else: a batch size that became a constant, a mask
that was all ones, two sizes that happened to be equal. So every exact pass is checked on inputs
that share nothing with the sample but what makes them legal:

- every dynamic dimension gets another size within its range, at least 2 where possible, and no two
  dimensions the same size; derived ones (``2*length``) follow;
- integers are drawn from the sample's own values, floats from its mean and deviation and within
  its smallest and largest value;
- masks (only 0 and 1, or only 0 and very negative) get padding at the end of every row, but keep
  position 0.

All values come from one seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor

from planish.ir.errors import PassError, UsageError
from planish.ir.execute import run
from planish.ir.program import Program

# An additive mask holds zeros and numbers below this, usually the lowest of its type.
_MASKED_BELOW = -1e3

# From here on, half of the sample's size is still a good probe, and cheaper than one more; so is a
# quarter of one so large that a quarter is large as well.
_LARGE = 16
_HUGE = 128


@dataclass(frozen=True)
class Reference:
    """The second probe and what the program itself answers there.

    Attributes:
        inputs: flat inputs, or None where there are none that the program accepts.
        outputs: what the program returns for them; empty where ``inputs`` is None.
        sizes: dimension name -> size, for every dynamic dimension.
        resized: whether any size differs from the sample's.
        rejected: one sentence for each set of sizes that the program itself refused.
    """

    inputs: tuple[Any, ...] | None
    outputs: tuple[Any, ...] = ()
    sizes: Mapping[str, int] | None = None
    resized: bool = False
    rejected: tuple[str, ...] = ()


def second_probe(program: Program, seed: int = 0, sample: int = 0) -> tuple[Any, ...] | None:
    """Flat inputs at another legal size of every dynamic dimension, with other values.

    A program may reject sizes that its ranges allow (a crop that must divide them);
    ``second_reference`` finds out.

    Args:
        program: gives sample, dimensions and ranges; a static one gets other values only.
        seed: of all random values.
        sample: which of the program's samples to start from.

    Returns:
        One value per placeholder; None where nothing can vary.
    """
    if not program.placeholders or not program.samples:
        return None
    sizes = _second_sizes(program, sample, together=False, double=False)
    return _varied(program, sizes, seed, sample)


def second_reference(program: Program, seed: int = 0, sample: int = 0) -> Reference:
    """Find a second probe that the program accepts, and run it there.

    Sizes that fail, or give no finite number, are given up one after the other: all different,
    those equal in the sample kept equal, doubled, and last the sample's own with other values.
    Each failure is a sentence in ``rejected``, so that nobody takes the rest for a full check.
    """
    if not program.placeholders or not program.samples:
        return Reference(None)
    own = _sample_sizes(program, sample)
    rejected: list[str] = []
    for sizes in _attempts(program, own, sample):
        inputs = _varied(program, sizes, seed, sample)
        if inputs is None:
            continue
        named = _named(program, sizes)
        at = ", ".join(f"{k}={v}" for k, v in named.items()) or "other values"
        try:
            outputs = run(program, inputs)
        except PassError as error:
            rejected.append(f"the program itself rejects {at}: {error.what}")
            continue
        if not _any_finite(outputs):
            rejected.append(f"the program itself gives no finite number at {at}")
            continue
        return Reference(inputs, outputs, named, sizes != own, tuple(rejected))
    return Reference(None, rejected=tuple(rejected))


def _any_finite(outputs: tuple[Any, ...]) -> bool:
    """Whether there is anything to compare: a finite number, an integer, or no number at all."""
    floats = [v for v in outputs if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
    return not floats or any(bool(v.double().isfinite().any()) for v in floats)


def sample_inputs_at(
    program: Program, sizes: Mapping[str, int], *, seed: int = 0, sample: int = 0
) -> tuple[Any, ...]:
    """Flat inputs like a sample, at given sizes.

    Args:
        program: gives sample and dimensions.
        sizes: dimension name (the user's, or torch's symbol) -> size; the others keep theirs.
        seed: of all random values.
        sample: which of the program's samples to start from.

    Raises:
        UsageError: there is no such dimension, a size is outside its range, or there is no sample.
    """
    if not program.samples:
        raise UsageError("the program has no sample inputs", hint="capture it with example inputs")
    wanted = _sample_sizes(program, sample)
    symbols = {name: symbol for symbol, name in program.signature.symbols.items()}
    for name, size in sizes.items():
        symbol = symbols.get(name, name)
        if symbol not in wanted:
            known = ", ".join(_named(program, wanted)) or "none: all its sizes are static"
            raise UsageError(f"no dynamic dimension {name!r}", hint=f"the program has {known}")
        low, high = program.signature.ranges.get(symbol, (0, None))
        if size < low or (high is not None and size > high):
            raise UsageError(
                f"dimension {name} cannot be {size}",
                hint=f"its legal sizes are {low} to {'any' if high is None else high}",
            )
        wanted[symbol] = size
    return _inputs(program, wanted, seed, sample)


# -- sizes ----------------------------------------------------------------------------------------


def _placeholder_dims(program: Program, sample: int) -> Iterator[tuple[sympy.Expr, int]]:
    """Every symbolic size among the inputs, with the sample's size."""
    for node, value in zip(program.placeholders, program.samples[sample], strict=True):
        declared = node.meta.get("val")
        if isinstance(declared, SymInt):
            yield declared.node.expr, int(value)
        elif isinstance(declared, Tensor) and isinstance(value, Tensor):
            for dim, size in zip(declared.shape, value.shape, strict=True):
                if isinstance(dim, SymInt) and not dim.node.expr.is_Integer:
                    yield dim.node.expr, size


def _sample_sizes(program: Program, sample: int) -> dict[str, int]:
    """The sample's size of every symbol, in order of appearance."""
    dims = list(_placeholder_dims(program, sample))
    sizes: dict[str, int] = {}
    for expr, _ in dims:
        for symbol in sorted(expr.free_symbols, key=str):
            sizes.setdefault(str(symbol), -1)
    for _ in range(len(sizes)):  # each round may solve one symbol that another hangs on
        for expr, size in dims:
            known = expr.xreplace(_values(sizes, expr))
            unknown = list(known.free_symbols)
            if len(unknown) == 1:
                # torch's symbols are positive, and a sample may be empty.
                plain = sympy.Dummy(integer=True)
                solved = sympy.solve(known.xreplace({unknown[0]: plain}) - size, plain)
                roots = [r for r in solved if r.is_Integer and r >= 0]
                if roots:
                    sizes[str(unknown[0])] = int(roots[0])
    unsolved = [symbol for symbol, size in sizes.items() if size < 0]
    if unsolved:
        raise UsageError(f"the sample's sizes do not determine the dimension {unsolved[0]}")
    return sizes


def _values(sizes: Mapping[str, int], expr: sympy.Expr) -> dict[sympy.Symbol, sympy.Integer]:
    known = {s: sizes.get(str(s), -1) for s in expr.free_symbols}
    return {symbol: sympy.Integer(size) for symbol, size in known.items() if size >= 0}


def _second_sizes(program: Program, sample: int, *, together: bool, double: bool) -> dict[str, int]:
    """Another size for every symbol.

    Args:
        program: gives the ranges.
        sample: whose sizes to differ from.
        together: give symbols of one size in the sample one size again.
        double: double the sizes, which keeps whatever they are divisible by.
    """
    chosen: dict[str, int] = {}
    for symbol, size in _sample_sizes(program, sample).items():
        low, high = program.signature.ranges.get(symbol, (0, None))
        part = 4 if size >= _HUGE else 2
        wish = 2 * size if double else size // part if size >= _LARGE else size + 1
        near = [wish, *range(size + 1, size + 9), *range(size - 1, max(size - 9, 1), -1), 2]
        legal = [n for n in [*near, low, low + 1] if low <= n and (high is None or n <= high)]
        other = [n for n in legal if n != size]
        large = [n for n in other if n >= 2]
        fresh = [n for n in large if together or n not in chosen.values()]
        chosen[symbol] = (fresh or large or [n for n in other if n >= 1] or [size])[0]
    return chosen


def _attempts(program: Program, own: dict[str, int], sample: int) -> Iterator[dict[str, int]]:
    seen = []
    for together, double in ((False, False), (True, False), (True, True)):
        sizes = _second_sizes(program, sample, together=together, double=double)
        if sizes not in seen and sizes != own:
            seen.append(sizes)
            yield sizes
    yield own


def _named(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    return {program.signature.symbols.get(s, s): size for s, size in sizes.items()}


# -- values ---------------------------------------------------------------------------------------


def _varied(
    program: Program, sizes: Mapping[str, int], seed: int, sample: int
) -> tuple[Any, ...] | None:
    """Inputs at these sizes; None where they are the sample itself."""
    inputs = _inputs(program, sizes, seed, sample)
    given = program.samples[sample]
    return None if all(map(_identical, inputs, given)) else inputs


def _identical(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or a == b


def _inputs(program: Program, sizes: Mapping[str, int], seed: int, sample: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    inputs: list[Any] = []
    for node, value in zip(program.placeholders, program.samples[sample], strict=True):
        declared = node.meta.get("val")
        if isinstance(declared, SymInt):
            inputs.append(_size_at(declared, sizes))
        elif isinstance(declared, Tensor) and isinstance(value, Tensor):
            shape = tuple(_size_at(d, sizes) for d in declared.shape)
            drawn = _draw(value.detach().cpu(), shape, generator)
            inputs.append(drawn.to(value.dtype).to(value.device))
        else:
            inputs.append(value)
    return tuple(inputs)


def _size_at(dim: int | SymInt, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    expr = dim.node.expr
    return int(expr.xreplace(_values(sizes, expr)))


def _draw(sample: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values like the sample's, in another shape."""
    if sample.numel() == 0:
        return torch.zeros(shape, dtype=sample.dtype)
    if sample.is_complex():
        parts = torch.view_as_real(sample)
        drawn = [_draw(parts[..., i], shape, generator) for i in (0, 1)]
        real, imaginary = (part.to(parts.dtype) for part in drawn)
        return torch.complex(real, imaginary)
    if sample.is_floating_point() and sample.element_size() == 1:
        sample = sample.float()  # torch neither compares 8-bit floats nor sums them up
    mask = _mask_values(sample)
    if mask is not None:
        return _padded(sample.dtype, shape, mask, generator)
    finite = sample[sample.isfinite()] if sample.is_floating_point() else sample[:0]
    if finite.numel() == 0:
        pick = torch.randint(sample.numel(), shape, generator=generator)
        return sample.reshape(-1)[pick]
    return _normal(finite.to(torch.float64), shape, generator)


def _normal(finite: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values of the sample's mean and deviation, within its smallest and largest."""
    low, high = float(finite.min()), float(finite.max())
    mean = float(finite.mean())
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    if low < high:
        return (mean + noise * float(finite.std())).clamp(low, high)
    if mean == 0.0:
        return noise  # a probe of zeros would see nothing
    return mean * (1.0 + noise.clamp(-3.0, 3.0) / 4.0)  # a constant of the user's keeps its sign


def _mask_values(sample: Tensor) -> tuple[Any, Any] | None:
    """What a mask keeps and drops with; None where the sample is no mask."""
    if sample.dtype == torch.bool:
        keep = bool(sample.reshape(-1)[0])  # either convention: position 0 says what keeps
        return keep, not keep
    ones = sample == 1
    zeros = sample == 0
    if bool((ones | zeros).all()) and bool(ones.any()):
        return 1, 0
    if not sample.is_floating_point():
        return None
    masked = sample <= _MASKED_BELOW
    if bool((zeros | masked).all()) and bool(zeros.any()) and bool(masked.any()):
        return 0.0, float(sample.min())
    return None


def _padded(
    dtype: torch.dtype, shape: tuple[int, ...], values: tuple[Any, Any], generator: torch.Generator
) -> Tensor:
    """A mask whose rows keep a random number of positions, at least the first, and drop the rest.

    Every row drops at least one, so that none is dropped entirely if ``keep`` was mistaken.
    """
    keep, drop = values
    mask = torch.full(shape, keep, dtype=dtype)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    if not long:
        return mask
    axis, size = long[-1], shape[long[-1]]
    rows = tuple(1 if i == axis else n for i, n in enumerate(shape))
    lengths = torch.randint(1, size, rows, generator=generator)
    positions = torch.arange(size).reshape([size if i == axis else 1 for i in range(len(shape))])
    return torch.where(positions >= lengths, torch.tensor(drop, dtype=dtype), mask)
