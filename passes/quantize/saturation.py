"""Which integer products saturate where, and by how much that changes their answers.

x86 processors without VNNI multiply uint8 by int8 with an instruction that adds each pair of
neighbors in 16 bits, saturating:

    y = sum_i  clamp(x[2i] w[2i] + x[2i+1] w[2i+1], -32768, 32767)

Two products of up to 255 * 127 do not fit, so a file that was right on one machine is wrong on
another. Seven bits of weights fit (255 * 2 * 63 = 32130), and so does int8 by int8. Runtimes widen
uint8 by uint8 and depthwise convolutions to 16 bits first; those never saturate.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, PMADDUBSW; ONNX
        Runtime documentation, "Quantize ONNX models", section on data types.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from planish.ir.execute import run
from planish.ir.program import Program
from planish.passes.quantize.kernel_rows import Mixed, mixed_operators, rows_of, zero_point_of

INT16 = (-(2**15), 2**15 - 1)
# Where nothing can saturate, and where u8*s8 adds in 32 bits.
EVERYWHERE = ("x86-64", "arm64")
WIDE = ("x86-64 with AVX512-VNNI, AVX-VNNI or AMX-INT8", "arm64")
# At a time: the pairs of a whole product at once would fill the memory.
_COLUMNS, _ROWS = 16, 4096


@dataclass(frozen=True)
class Saturation:
    """What 16-bit sums do to one operator.

    Attributes:
        node: its name.
        pairs: how many pairs were added.
        saturated: how many of them did not fit.
        sqnr_db: of its sums with all pairs cut to 16 bits, against the sums in 32 bits; infinite
            where none saturated.
    """

    node: str
    pairs: int
    saturated: int
    sqnr_db: float


def pair_sums(x: Tensor, w: Tensor) -> Tensor:
    """The sums of neighboring products, before they are cut to 16 bits.

    Args:
        x: ``[M, K]`` uint8.
        w: ``[N, K]`` int8.

    Returns:
        ``[M, N, ceil(K / 2)]`` int32; an odd last element is alone.
    """
    products = x.to(torch.int32)[:, None] * w.to(torch.int32)[None]
    if products.shape[-1] % 2:
        products = torch.nn.functional.pad(products, (0, 1))
    pairs: Tensor = products.unflatten(-1, (-1, 2)).sum(-1, dtype=torch.int32)
    return pairs


def saturating_product(x: Tensor, w: Tensor) -> tuple[Tensor, int]:
    """The integer product ``x w^T`` with pairs added in 16 bits.

    Args:
        x: ``[M, K]`` uint8.
        w: ``[N, K]`` int8.

    Returns:
        ``[M, N]`` int32, and how many pairs saturated.
    """
    cut, _, count = _products(x, w)
    return cut, count


def _products(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, int]:
    """The product as 16-bit sums make it, as it should be, and how many pairs saturated."""
    blocks, count = [], 0
    for part in x.split(_ROWS):
        columns = []
        for rows in w.split(_COLUMNS):
            sums = pair_sums(part, rows)
            cut = sums.clamp(*INT16)
            count += int((sums != cut).sum())
            columns.append(torch.stack([cut.sum(-1), sums.sum(-1)]))
        blocks.append(torch.cat(columns, 2))
    both = torch.cat(blocks, 1)
    return both[0].to(torch.int32), both[1].to(torch.int32), count


def can_saturate(w: Tensor, largest: int = 255) -> bool:
    """Whether some uint8 operand makes a pair with these weights saturate.

    Args:
        w: ``[..., K]`` int8.
        largest: the largest value of the other operand.
    """
    if w.shape[-1] % 2:
        w = torch.nn.functional.pad(w, (0, 1))
    pairs = w.to(torch.int32).unflatten(-1, (-1, 2)) * largest
    highest, lowest = pairs.clamp(min=0).sum(-1), pairs.clamp(max=0).sum(-1)
    return bool((highest > INT16[1]).any() or (lowest < INT16[0]).any())


def saturating_operators(program: Program) -> tuple[str, ...]:
    """The operators in which a pair of uint8 by int8 can saturate, by name, each once."""
    found = (mixed.node.name for mixed in mixed_operators(program) if can_saturate(mixed.weight))
    return tuple(dict.fromkeys(found))


def instruction_sets(program: Program) -> tuple[str, ...]:
    """The processors on which integer kernels give the answers of this program."""
    return WIDE if saturating_operators(program) else EVERYWHERE


def portability(program: Program) -> tuple[str, ...]:
    """A sentence for the report, where answers depend on the processor."""
    found = saturating_operators(program)
    if not found:
        return ()
    return (
        f"sums of uint8 * int8 pairs can saturate in {len(found)} operators on x86 processors "
        "without VNNI; saturation=reduced or signed, or weights=uint8, gives the same answers "
        "everywhere",
    )


def measure(program: Program, inputs: Sequence[Any]) -> tuple[Saturation, ...]:
    """What 16-bit sums do to each operator on real inputs.

    Operators are looked at one by one, each fed by the values of the program itself. Recurrent
    layers are left out: their state never shows.

    Args:
        program: quantized.
        inputs: one value per placeholder.
    """
    by_codes: dict[Node, list[Mixed]] = {}
    for mixed in mixed_operators(program):
        if mixed.codes is not None:
            by_codes.setdefault(mixed.codes, []).append(mixed)
    results: dict[str, Saturation] = {}

    def see(node: Node, value: Any) -> None:  # noqa: ANN401 - of any operator
        codes = value[0] if isinstance(value, tuple) else value
        for mixed in by_codes.get(node, ()):
            results[mixed.node.name] = _measured(
                mixed, rows_of(mixed, codes, zero_point_of(mixed, program))
            )

    run(program, inputs, observe=see)
    return tuple(results[node.name] for node in program.operators if node.name in results)


def _measured(mixed: Mixed, rows: Iterator[Tensor]) -> Saturation:
    pairs = saturated = 0
    noise = signal = 0.0
    for x, w in zip(rows, mixed.weight, strict=True):
        cut, exact, count = _products(x, w)
        pairs += cut.numel() * ((w.shape[1] + 1) // 2)
        saturated += count
        noise += float((cut.double() - exact.double()).square().sum())
        signal += float(exact.double().square().sum())
    quiet = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return Saturation(mixed.node.name, pairs, saturated, quiet)
