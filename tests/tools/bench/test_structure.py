"""The rows of the structure bench, its labels, and what counts as beyond int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from planish.ir.errors import RecipeError
from planish.passes.recipe import Recipe
from planish.tools.bench.quantization.table import Row
from planish.tools.bench.structure.pareto import (
    Entry,
    beyond,
    distance,
    embedding,
    entries,
    frontier,
    labels,
)


def _row(name: str, ratio: float | None, cosine: float) -> Row:
    return Row(name, ratio=ratio, scores={} if ratio is None else {"cosine": cosine})


CHOSEN = [Entry("int8-static", "", "int8-static"), Entry("a", ""), Entry("b", "", "int8-static")]


def test_a_row_that_is_faster_and_no_less_faithful_is_beyond() -> None:
    int8 = _row("int8-static", 2.9, 0.997)
    assert beyond([int8, _row("b", 3.0, 0.997)], CHOSEN) == ["b"]
    assert beyond([int8, _row("b", 2.8, 0.999)], CHOSEN) == []
    assert beyond([int8, _row("b", 3.0, 0.996)], CHOSEN) == []
    assert beyond([int8, _row("a", 3.0, 0.998)], CHOSEN) == []  # not composed with int8


def test_what_another_int8_beats_is_not_beyond() -> None:
    rows = [_row("int8-static", 2.9, 0.997), _row("int8-dynamic", 3.2, 0.999)]
    assert beyond([*rows, _row("b", 3.0, 0.998)], CHOSEN) == []


def test_the_frontier_leaves_out_failures_and_what_is_beaten() -> None:
    rows = [_row("x", 1.0, 1.0), _row("y", 2.0, 0.9), _row("z", 1.5, 0.8), _row("w", None, 0.0)]
    assert frontier(rows) == {"x", "y"}


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e.name)
def test_every_recipe_can_be_read(entry: Entry) -> None:
    try:
        Recipe.parse(entry.recipe)
    except RecipeError as error:
        pytest.fail(str(error))


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.table(ids)
        return states


def test_labels_leave_out_padding_and_give_a_gradient() -> None:
    torch.manual_seed(0)
    model = _Words()
    ids = torch.tensor([[1, 2, 3, 9, 9], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = labels(model, [(ids, mask)], seed=1)
    assert [inputs[0].shape for inputs, _ in found] == [(1, 3), (1, 5)]
    loss = distance(model(*found[0][0]), found[0])
    loss.backward()
    gradient = model.table.weight.grad
    assert gradient is not None
    assert gradient[1:4].abs().min() > 0
    assert not gradient[9].any()
    again = labels(model, [(ids, mask)], seed=1)
    assert torch.equal(again[1][1], found[1][1])
    padded = embedding(model(ids, mask), mask)[0]
    torch.testing.assert_close(padded, embedding(model(*found[0][0]), found[0][0][1])[0])
