"""A write into a tensor of the program before is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from planish.ir.capture import capture
from planish.ir.errors import VerificationError
from planish.ir.program import Program
from planish.ir.snapshot import Snapshot, checksum
from planish.ir.verify import verify
from tests.support.broken import broken_rules, net
from tests.support.strategies import normal


def written(program: Program, write: Callable[[], Any], *, values: bool = False) -> list[str]:
    snapshot = Snapshot(program, values=values)
    assert list(snapshot.written()) == []
    write()
    return list(snapshot.written())


def test_a_write_into_a_shared_constant_is_found() -> None:
    before = net()
    after = before.clone()
    weight = after.constants["two.weight"]
    assert isinstance(weight, Tensor)
    snapshot = Snapshot(before)
    weight.mul_(2)
    assert broken_rules(after, since=before, snapshot=snapshot) == {"constants-unwritten"}
    with pytest.raises(VerificationError, match=r"the constant 'two\.weight' was written"):
        verify(after, since=before, snapshot=snapshot)


def test_a_write_through_an_alias_is_found() -> None:
    program = net()
    weight = program.constants["two.weight"]
    assert isinstance(weight, Tensor)
    assert written(program, lambda: weight.detach().t()[0].zero_()) == ["the constant 'two.weight'"]


def test_a_write_into_a_sample_is_found() -> None:
    program = net()
    program.samples = ((torch.ones(2, 3, 4), torch.ones(2, 3, 1)),)
    found = written(program, lambda: program.samples[0][1].zero_())
    assert found == ["the input 'mask' of sample 0"]


def test_a_sample_that_misses_an_input_is_left_to_its_own_rule() -> None:
    program = net()
    program.samples = ((torch.ones(2, 3, 4),),)
    found = written(program, lambda: program.samples[0][0].zero_())
    assert found == ["the input 'x' of sample 0"]
    assert broken_rules(program, since=net(), snapshot=Snapshot(program)) == {"samples-match"}


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.add_(1),
        lambda weight: weight.numpy().fill(0),
        lambda weight: weight.data.copy_(weight.flip(0)),
    ],
)
def test_writes_that_torch_does_not_count_are_found(write: Any, values: bool) -> None:
    program = net()
    weight = program.constants["two.weight"]
    found = written(program, lambda: write(weight), values=values)
    assert found == ["the constant 'two.weight'"]


def test_only_a_checksum_finds_one_element_of_many() -> None:
    program = net()
    program.constants["two.weight"] = weight = torch.ones(512, 512)

    def write() -> None:
        weight.numpy()[300, 7] = 2

    assert written(program, write) == []
    weight.fill_(1)
    assert written(program, write, values=True) == ["the constant 'two.weight'"]


def test_a_constant_that_is_not_contiguous_is_looked_at() -> None:
    program = net()
    program.constants["two.weight"] = weight = torch.randn(64, 3)[::2].t()
    assert written(program, lambda: weight.numpy().fill(0)) == ["the constant 'two.weight'"]


def test_tensors_of_inference_mode_are_watched_too() -> None:
    program = net()
    with torch.inference_mode():
        program.constants["two.weight"] = weight = torch.ones(8, 8)

    def write() -> None:
        with torch.inference_mode():
            weight.add_(1)

    assert written(program, write) == ["the constant 'two.weight'"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64]
)
def test_checksums_hold_for_every_type_and_layout(dtype: torch.dtype) -> None:
    tensor = normal((6, 5), 0).mul(10).round().clamp(0).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    assert checksum(tensor.t()) != checksum(tensor)
    assert checksum(tensor[:, 1:3]) == checksum(tensor[:, 1:3].clone())
    assert checksum(torch.empty(0, dtype=dtype)) == 0
    assert checksum(tensor[0, 0]) == checksum(tensor[:1, :1])


def test_a_write_into_the_body_of_a_branch_is_found() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    program = capture(Branch().eval(), (torch.ones(2),))
    names = [n for n, c in program.constants.items() if isinstance(c, GraphModule)]
    body = program.constants[names[0]]
    assert isinstance(body, GraphModule)
    (call,) = body.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)

    def write() -> None:
        call.target = torch.ops.aten.tan.default

    assert written(program, write) == [f"the body {names[0]!r} of a branch"]
