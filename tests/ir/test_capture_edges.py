"""What capture takes over from torch, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule

from planish.ir import capture, from_exported
from planish.ir.capture import _attribute
from planish.ir.errors import UnsupportedError, UsageError


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, first: Tensor) -> Tensor:
        return self.linear(first)


class Outer(nn.Module):
    """Modules within, an input and a parameter that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.unread = nn.Parameter(torch.ones(100))

    def forward(self, x: Tensor, *, scale: Tensor, spare: Tensor | None = None) -> Tensor:
        return self.inner(x) * scale


def exported() -> torch.export.ExportedProgram:
    kwargs = {"scale": torch.randn(4, 3), "spare": torch.randn(2)}
    return torch.export.export(Outer().eval(), (torch.randn(4, 3),), kwargs)


def test_an_exported_program_is_called_by_the_names_of_its_forward() -> None:
    program = from_exported(exported())
    assert program.signature.parameters == ("x", "scale", "spare")
    x, scale, spare = program.samples[0]
    expected = program(x, scale=scale, spare=spare)
    assert torch.equal(program(spare=spare, scale=scale, x=x), expected)
    with pytest.raises(UsageError, match="unknown input 'first'"):
        program(x, scale=scale, spare=spare, first=x)


def test_an_unread_input_of_its_own_is_no_mistake() -> None:
    whole = exported()
    program = from_exported(whole)
    assert program.remarks == ()
    unread = [n.name for n in program.placeholders if not n.users]
    assert unread == ["spare"]


@pytest.mark.parametrize("through", ["module", "exported"])
def test_constants_that_nobody_reads_are_left_behind(through: str) -> None:
    if through == "exported":
        program = from_exported(exported())
    else:
        kwargs = {"scale": torch.randn(4, 3)}
        program = capture(Outer().eval(), (torch.randn(4, 3),), kwargs)
    assert sorted(program.constants) == ["inner.linear.bias", "inner.linear.weight"]
    assert not any(c.requires_grad for c in program.constants.values() if isinstance(c, Tensor))


def test_an_assertion_draws_no_random_numbers() -> None:
    class Asserts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert_async(x.sum() < 1e9)
            return x * 2

    program = capture(Asserts().eval(), (torch.ones(3),))
    assert len(program.remarks) == 1
    assert "assertions" in program.remarks[0]


def test_ranges_and_names_of_an_exported_program() -> None:
    batch = Dim("batch", min=2, max=9)
    whole = torch.export.export(Inner().eval(), (torch.randn(4, 3),), dynamic_shapes=({0: batch},))
    program = from_exported(whole)
    assert list(program.signature.ranges.values()) == [(2, 9)]
    with pytest.raises(UsageError):
        program(torch.randn(10, 3))


def test_attributes_are_tensors_without_a_gradient_or_graphs() -> None:
    module: Any = GraphModule(nn.Module(), Graph())
    module.linear = nn.Linear(3, 3)
    found = _attribute(module, "linear.weight")
    assert isinstance(found, Tensor)
    assert not found.requires_grad
    assert found.data_ptr() == module.linear.weight.data_ptr()
    module.body = GraphModule(nn.Module(), Graph())
    assert _attribute(module, "body") is module.body
    module.word = "word"
    with pytest.raises(UnsupportedError, match="holds 'word', a str"):
        _attribute(module, "word")


def test_of_two_inputs_of_one_example_the_one_that_is_not_read_is_named() -> None:
    class Minus(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * 2 - b

    x = torch.randn(4, 3)
    (remark,) = from_exported(torch.export.export(Minus().eval(), (x, x))).remarks
    assert "is not read, and its example is another input's, too" in remark
    assert from_exported(torch.export.export(Minus().eval(), (x, x.clone()))).remarks == ()
