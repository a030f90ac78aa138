"""Any set of operators is a legal program, and computes what it computed within the whole."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir import Program, capture, load, save, text
from planish.ir.errors import PassError
from planish.ir.execute import run
from planish.ir.verify import verify
from planish.passes.debug.reduce_values import Recorded
from planish.passes.debug.subgraph import can_cut, closure, induced, without
from planish.passes.debug.subgraph_sizes import untold
from tests.support.nets import branch_program, net_program
from tests.support.real_models import inputs, loaded


class Sizes(nn.Module):
    """Sizes and tuples between the tensors, values used twice, a batch and a doubled batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
        rows = x.shape[0]
        twice = torch.cat([x, -x])
        y = self.first(twice).relu()
        a, b, c = self.norm(y).split(2, -1)
        z = (a * c).reshape(rows, 4)
        w = torch.nn.functional.pad(z, (0, 2)) * mask
        strided = y.t().as_strided((6, 2), (1, 6))
        return w + x, (a + b).expand(2 * rows, 2).transpose(0, 1), rows + strided.shape[0]


@functools.cache
def sizes_program() -> tuple[Program, Recorded]:
    torch.manual_seed(0)
    batch = Dim("batch", min=1, max=32)
    args = (torch.randn(4, 6), torch.ones(4, 1))
    program = capture(Sizes().eval(), args, dynamic_shapes=({0: batch}, {0: batch}))
    other = program.signature.flatten((torch.randn(7, 6), torch.rand(7, 1)), {})
    program.samples = (*program.samples, other)
    return program, Recorded(program)


@functools.cache
def minilm_program() -> tuple[Program, Recorded]:
    description, model = loaded("minilm")
    args, kwargs = inputs("minilm")
    program = capture(model, args, kwargs, dynamic_shapes=description.dynamic_shapes)
    return program, Recorded(program)


def same_value(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def assert_faithful(program: Program, values: Recorded, keep: set[str]) -> Program:
    """The induced program is legal, and its outputs are bit for bit those of the whole."""
    part = induced(program, keep, values)
    verify(part)
    assert {n.name for n in part.operators} == closure(program, keep) >= keep
    kept = {n.name: n for n in program.operators}
    for node in part.operators:
        original = kept[node.name]
        assert node.target is original.target
        assert node.meta.get("stack_trace") == original.meta.get("stack_trace")
        assert node.meta.get("nn_module_stack") == original.meta.get("nn_module_stack")
    wanted = values.of([n.name for n in part.results])
    assert len(part.samples) == len(program.samples)
    for number, sample in enumerate(part.samples):
        for node, value in zip(part.results, run(part, sample), strict=True):
            expected = wanted[node.name][number]
            assert same_value(value, expected), node.name
    return part


@given(st.data())
def test_any_subset_is_a_legal_program_that_computes_the_recorded_values(
    data: st.DataObject,
) -> None:
    program, values = sizes_program()
    names = [n.name for n in program.operators]
    assert_faithful(program, values, data.draw(st.sets(st.sampled_from(names))))


def test_every_single_operator_and_all_but_it_survive_a_file(tmp_path: Path) -> None:
    program, values = sizes_program()
    names = {n.name for n in program.operators}
    for name in sorted(names):
        for keep in ({name}, names - {name}):
            part = assert_faithful(program, values, keep)
            save(part, tmp_path / "part.pt2")
            again = load(tmp_path / "part.pt2")
            verify(again)
            assert text(again, values=True) == text(part, values=True)
            for sample, other in zip(part.samples, again.samples, strict=True):
                assert all(map(same_value, run(part, sample), run(again, other)))


@pytest.mark.parametrize("count", [1, 5, 30, 120])
def test_parts_of_minilm_compute_the_recorded_values(count: int) -> None:
    program, values = minilm_program()
    chosen = random.Random(count).sample([n.name for n in program.operators], count)
    assert_faithful(program, values, set(chosen))


def test_a_real_program_of_many_pytrees_can_be_cut() -> None:
    _, program = net_program()
    values = Recorded(program)
    for node in program.operators:
        assert_faithful(program, values, {node.name})


def test_a_branch_comes_with_its_bodies() -> None:
    program = branch_program()
    (cond,) = (n for n in program.operators if "cond" in str(n.target))
    part = induced(program, {cond.name}, Recorded(program))
    verify(part)
    assert len(part.constants) == 3
    (expected,) = run(program, program.samples[0])
    assert torch.equal(run(part, part.samples[0])[0], expected)


def test_the_operators_of_sizes_and_tuples_come_along() -> None:
    program, _ = sizes_program()
    (item,) = (n for n in program.operators if n.name == "getitem_1")
    split = item.all_input_nodes[0]
    assert not can_cut(split, item)
    assert closure(program, {item.name}) == {item.name, split.name}
    everything = {n.name for n in program.operators}
    left = without(program, everything, {split.name})
    assert not left & {split.name, "getitem", "getitem_1", "getitem_2"}
    assert closure(program, left) == left


def test_inputs_read_by_nobody_stay_where_they_alone_tell_a_size() -> None:
    program, values = sizes_program()
    relu = next(n.name for n in program.operators if n.name.startswith("relu"))
    part = induced(program, {relu}, values)
    assert text(part).splitlines()[0] == ("program(%x: f32[batch, 6], %linear: f32[2*batch, 6])")
    assert not part.placeholders[0].users
    assert part.signature.symbols.keys() == program.signature.symbols.keys()
    assert part.signature.ranges == program.signature.ranges
    assert not untold(part)


def test_the_program_it_came_from_stays_as_it_was() -> None:
    program, values = sizes_program()
    before = text(program, values=True)
    induced(program, {n.name for n in program.operators[3:6]}, values)
    assert text(program, values=True) == before


def test_values_beyond_the_limit_are_computed_when_asked_for() -> None:
    program, all_at_once = sizes_program()
    few = Recorded(program, limit_bytes=100)
    names = [n.name for n in program.operators[:4]]
    expected, got = all_at_once.of(names), few.of(names)
    assert few._all is None
    assert got.keys() == expected.keys() == set(names)
    for name in names:
        for a, b in zip(expected[name], got[name], strict=True):
            assert same_value(a, b)


def test_recorded_values_own_their_memory_in_row_major_order() -> None:
    program, values = sizes_program()
    transposed = next(n.name for n in program.operators if n.name.startswith("transpose"))
    for value in values.of([transposed])[transposed]:
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes


def test_values_before_an_operator_that_fails_are_known() -> None:
    program = sizes_program()[0].clone()
    program.samples = program.samples[:1]
    (layer,) = (n for n in program.operators if n.name == "layer_norm")
    layer.args = (layer.args[0], [5], *layer.args[2:])
    values = Recorded(program)
    assert len(values.of(["relu"])["relu"]) == 1
    with pytest.raises(PassError, match="before it has computed layer_norm"):
        values.of(["relu", "layer_norm"])
