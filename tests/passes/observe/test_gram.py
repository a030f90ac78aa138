"""Gram matrices: the quadratic form of a layer's output, whatever the layer and the limit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.capture import capture
from planish.ir.errors import PassError, RequirementError, UnsupportedError, UsageError
from planish.ir.ops import op_name
from planish.ir.program import Program
from planish.passes.calibrate import spool
from planish.passes.observe import Gram, gram

CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, padding=1, bias=False), (4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), bias=False), (4, 9, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 6, 6)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=False), (4, 6, 6)),
    (nn.Conv2d(4, 6, (2, 4), padding="same", bias=False), (4, 6, 6)),
    (nn.Conv2d(4, 6, 2, padding="valid", bias=False), (4, 6, 6)),
    (nn.Conv1d(4, 6, 3, padding=2, stride=2, bias=False), (4, 9)),
    (nn.Conv1d(4, 6, 3, padding=2, padding_mode="zeros", groups=2, bias=False), (4, 9)),
    (nn.Linear(5, 6, bias=False), (3, 5)),
]


def captured(module: nn.Module, *shape: int) -> Program:
    dims = ({0: Dim("batch", max=64)},)
    return capture(module.eval(), (torch.randn(2, *shape),), dynamic_shapes=dims)


def layer(program: Program, *names: str) -> list[Any]:
    return [n for n in program.operators if any(part in op_name(n.target) for part in names)]


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS)
def test_the_quadratic_form_is_the_output_of_changed_weights(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    # The sum of squares of the outputs is w^T (X^T X) w for whatever weight.
    torch.manual_seed(0)
    program = captured(module, *shape)
    x = torch.randn(5, *shape)
    with spool([x[:3], x[3:]], program) as batches:
        (found,) = gram(program, layer(program, "conv", "linear"), batches)
    weight = torch.randn_like(module.get_parameter("weight"))
    module.load_state_dict({"weight": weight})
    outputs = module(x).detach().double()
    if isinstance(module, nn.Linear):
        per_channel = outputs.square().flatten(0, -2).sum(0)
    else:
        per_channel = outputs.square().transpose(0, 1).flatten(1).sum(1)
    matrix = found.matrix if found.matrix.dim() == 3 else found.matrix.unsqueeze(0)
    rows = weight.double().flatten(1).view(len(matrix), -1, matrix.shape[-1])
    form = torch.einsum("goi,gij,goj->go", rows, matrix, rows).flatten()
    torch.testing.assert_close(form, per_channel, rtol=1e-4, atol=1e-4)
    assert found.rows == outputs.numel() // weight.shape[0]


class Three(nn.Module):
    """Two layers that read the same value, and one that reads theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(torch.cat([self.a(x), self.b(x)], -1)))
        return out * mask.unsqueeze(-1)


def three() -> Program:
    dims = {0: Dim("batch", max=64), 1: Dim("tokens", min=2, max=64)}
    example = (torch.randn(2, 3, 4), torch.ones(2, 3))
    return capture(Three().eval(), example, dynamic_shapes=(dims, dims))


def batch(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    mask = (torch.rand(samples, 6, generator=generator) > 0.3).float()
    mask[:, 0] = 1
    return torch.randn(samples, 6, 4, generator=generator), mask


def test_padding_rows_are_left_out() -> None:
    program = three()
    x, mask = batch(4)
    tokens = x[mask.bool()].double()
    with spool([(x, mask)], program) as batches:
        first, second, third = gram(program, layer(program, "linear"), batches, padding_mask="mask")
        (everything, *_) = gram(program, layer(program, "linear"), batches)
    torch.testing.assert_close(first.matrix, tokens.T @ tokens, rtol=1e-5, atol=1e-5)
    assert first.rows == third.rows == len(tokens)
    assert second.matrix.data_ptr() == first.matrix.data_ptr()
    assert not first.padded
    assert everything.rows == 24
    node, matrix, rows = first
    assert (node, rows) == (first.node, first.rows)
    assert matrix is first.matrix


@pytest.mark.parametrize("limit", [0, 8 * 16, 8 * (16 + 49), 1 << 20])
def test_the_limit_changes_sweeps_not_numbers(limit: int) -> None:
    program = three()
    told: list[tuple[int, int]] = []
    with spool([batch(4), batch(3)], program) as batches:
        expected = list(gram(program, layer(program, "linear"), batches))
        found = list(
            gram(
                program,
                ["linear_2", "linear", "linear_1"],
                batches,
                limit_bytes=limit,
                tell=lambda done, total: told.append((done, total)),
            )
        )
    assert [g.node.name for g in found] == ["linear", "linear_1", "linear_2"]
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.matrix, other.matrix)
    sweeps = 1 if limit >= 8 * (16 + 49) else 2
    assert told == [(done, 2 * sweeps) for done in range(2 * sweeps + 1)]


def test_a_sweep_ends_at_the_last_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    program = three()
    ran: list[str] = []
    from planish.ir import execute

    evaluate = execute.evaluate

    def spy(node: Any, env: Any) -> Any:
        ran.append(node.name)
        return evaluate(node, env)

    monkeypatch.setattr(execute, "evaluate", spy)
    with spool([batch(2)], program) as batches:
        list(gram(program, ["linear"], batches))
        assert ran == []  # its operand is an input
        list(gram(program, ["linear_2"], batches))
    assert ran[-1] == "relu"
    assert "linear_2" not in ran


def test_later_sweeps_see_the_program_as_changed() -> None:
    program = three()
    with spool([batch(2)], program) as batches:
        matrices: dict[str, Gram] = {}
        for found in gram(program, ["linear", "linear_2"], batches, limit_bytes=0):
            matrices[found.node.name] = found
            program.constants["a.weight"] = torch.zeros(4, 4)
            program.constants["a.bias"] = torch.zeros(4)
    assert matrices["linear_2"].matrix[:4].abs().max() == 0
    assert matrices["linear_2"].matrix[4:, 4:].abs().max() > 0


def test_products_with_a_matrix() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))
            self.v = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(torch.ones(5), torch.matmul(x, self.w).flatten(0, 1), self.v)

    program = captured(Products(), 6, 4)
    x = torch.randn(3, 6, 4)
    with spool([x], program) as batches:
        first, second = gram(program, layer(program, "matmul", "addmm"), batches)
    rows = x.flatten(0, 1).double()
    torch.testing.assert_close(first.matrix, rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert second.matrix.shape == (3, 3)
    assert second.rows == 18


def test_errors() -> None:
    program = three()
    x, mask = batch(2)
    with spool([(x, mask)], program) as batches:
        with pytest.raises(UnsupportedError, match="no Gram matrix of relu"):
            list(gram(program, ["relu"], batches))
        with pytest.raises(UsageError, match="no operator 'lin'"):
            list(gram(program, ["lin"], batches))
    with pytest.raises(RequirementError, match="there are none"):
        list(gram(program, ["linear"], None))
    with (
        spool([(x, 0 * mask)], program) as batches,
        pytest.raises(RequirementError, match="never reached the operand of linear"),
    ):
        list(gram(program, ["linear"], batches, padding_mask="mask"))
    x[0, 0, 0] = torch.nan
    with (
        spool([(x, mask)], program) as batches,
        pytest.raises(PassError, match="batch 0 makes x NaN"),
    ):
        list(gram(program, ["linear"], batches))


def test_batched_products_have_no_one_matrix() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, x.transpose(1, 2))

    program = captured(Product(), 3, 4)
    with (
        spool([torch.randn(2, 3, 4)], program) as batches,
        pytest.raises(UnsupportedError, match="matmul"),
    ):
        list(gram(program, ["matmul"], batches))
