"""Axes of samples and tokens, and what is left of a value without its padding."""

from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor, nn

from planish.ir import capture
from planish.passes.observe.feeding import Padding
from planish.passes.observe.layout import Layout, layout

B, T = sympy.symbols("b t", integer=True, positive=True)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]).bool()
KEPT = int(MASK.sum())


def sizes(*values: object) -> tuple[sympy.Expr, ...]:
    return tuple(sympy.sympify(v) for v in values)


def kept(found: Layout, x: Tensor) -> Tensor:
    return torch.cat([p.flatten() for p in found.pieces(x, MASK, 3)]).sort().values


@pytest.mark.parametrize(
    ("declared", "shape", "axes"),
    [
        ((B, T), (3, 5), (1,)),
        ((B, T, 4), (3, 5, 4), (1,)),
        ((B * T, 4), (15, 4), (1,)),
        ((B, 2, T, 4), (3, 2, 5, 4), (2,)),
        ((B, 2, 4, T), (3, 2, 4, 5), (3,)),
        ((2 * B, T, 4), (6, 5, 4), (2,)),
        ((T, B, 4), (5, 3, 4), (1,)),
        ((B, 2, T, T), (3, 2, 5, 5), (2, 3)),
    ],
)
def test_tokens_of_padding_are_left_out(
    declared: tuple[object, ...], shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    found = layout(sizes(*declared), B, T)
    assert (found.token_axes, found.problem) == (axes, None)
    # Mark what must stay, by the meaning of the axes.
    mask = MASK.double()
    if declared == (T, B, 4):
        marks = mask.T.unsqueeze(-1).expand(shape)
    elif declared == (B * T, 4):
        marks = mask.reshape(15, 1).expand(shape)
    elif declared == (2 * B, T, 4):
        marks = mask.repeat_interleave(2, 0).unsqueeze(-1).expand(shape)
    elif len(axes) == 2:
        marks = (mask[:, None, :, None] * mask[:, None, None, :]).expand(shape)
    else:
        view = [3, *(5 if i == axes[0] else 1 for i in range(1, len(shape)))]
        marks = mask.view(view).expand(shape)
    numbered = torch.arange(marks.numel(), dtype=torch.float64).view(shape) + 1
    expected = numbered[marks.bool()].sort().values
    assert torch.equal(kept(found, numbered), expected)


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ((7, 4), "no axis of samples"),
        ((), "no axis of samples"),
        ((B, 7), "it has no axis of tokens"),
    ],
)
def test_what_cannot_be_masked_says_why(declared: tuple[object, ...], problem: str) -> None:
    assert problem in str(layout(sizes(*declared), B, T).problem)


def test_fixed_sizes_are_read_only_where_one_reading_is_possible() -> None:
    def of(*shape: int) -> Layout:
        return layout(sizes(*shape), sympy.Integer(3), sympy.Integer(5))

    assert of(3, 5, 4).token_axes == (1,)
    assert of(15, 4).token_axes == (1,)
    # Features that are as many as tokens stay.
    assert of(3, 5, 5).token_axes == (1,)
    assert of(3, 2, 5, 5).token_axes == (2,)
    assert of(3, 2, 4, 5).token_axes == (3,)
    assert "several axes" in str(of(3, 5, 5, 4).problem)
    assert "features as well as tokens" in str(of(3, 2, 5).problem)
    assert of(4, 5).problem is not None


def test_without_a_mask_samples_are_told_apart() -> None:
    x = torch.arange(24.0).view(6, 4)
    found = layout(sizes(2 * B, 4), B, None)
    assert found.problem is None
    assert [tuple(p.shape) for p in found.pieces(x, None, 3)] == [(3, 2, 4)]
    alone = layout(sizes(6, 4), None, None)
    assert [tuple(p.shape) for p in alone.pieces(x, None, 1)] == [(1, 6, 4)]


def test_axes_are_followed() -> None:
    assert layout(sizes(B, T, 4), B, T).axis(-1, 3) == 2
    assert layout(sizes(B * T, 4), B, T).axis(1, 2) == 2
    assert layout(sizes(T, B, 4), B, T).axis(2, 3) == 2
    assert layout(sizes(T, B, 4), B, T).axis(0, 3) == 1
    assert layout(sizes(B, 4), B, None).axis(0, 2) is None
    assert layout(sizes(6, 4), None, None).axis(0, 2) == 1


def test_large_values_come_in_pieces_of_whole_samples() -> None:
    x = torch.zeros(5, 300, 1000)
    found = layout(sizes(B, 300, 1000), B, None)
    assert [len(p) for p in found.pieces(x, None, 5)] == [1] * 5
    everything = layout(sizes(B, T, 1000), B, T)
    assert [len(p) for p in everything.pieces(x[:, :5], torch.ones(5, 5).bool(), 5)] == [5]


def test_a_sample_of_nothing_but_padding_is_skipped() -> None:
    mask = torch.tensor([[0, 0], [1, 0]]).bool()
    found = layout(sizes(B, T, 1), B, T)
    x = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert [p.flatten().tolist() for p in found.pieces(x, mask, 2)] == [[3.0]]


def test_one_name_for_two_symbols_is_one_dimension() -> None:
    """Torch gives the batch of each input a symbol of its own where nothing ties them."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu(), mask.sum(-1)

    program = capture(
        Masked().eval(),
        (torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.int64)),
        dynamic_shapes=(
            {0: torch.export.Dim("b"), 1: torch.export.Dim("t")},
            {0: torch.export.Dim("b2"), 1: torch.export.Dim("t2")},
        ),
    )
    names = {"b2": "b", "t2": "t"}
    program.signature = replace(
        program.signature,
        symbols={s: names.get(n, n) for s, n in program.signature.symbols.items()},
    )
    padding = Padding.of(program, "mask")
    found = padding.layout(next(n for n in program.operators if "relu" in n.name))
    assert (found.sample_axis, found.token_axes, found.problem) == (0, (1,), None)
