"""A written module gives the bits of its program, is captured again, and holds no foreign code."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir import Program, capture, text
from planish.ir.errors import UnsupportedError
from planish.ir.execute import run
from planish.passes.debug.module_literals import comment, identifier, literal, tensor
from planish.passes.debug.module_source import module_source, write_module
from planish.passes.debug.reduce_check import build, module_problem
from planish.passes.debug.reduce_steps import pattern, static
from tests.support.nets import branch_program, net_program

aten = torch.ops.aten

HOSTILE = 'x"""\\n\nimport os; os.abort()  #\u2028\r\x0c"\'\\'


class Small(nn.Module):
    """Constants of many types, sizes, a tuple, a doubled batch, values that are not finite."""

    few: Tensor
    halves: Tensor
    brain: Tensor
    mask: Tensor
    ids: Tensor
    plain: Tensor
    made: Tensor
    number: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(8, 8)
        self.register_buffer("few", torch.tensor([1.5, -0.0, math.inf]))
        self.register_buffer("halves", torch.randn(40).to(torch.float16))
        self.register_buffer("brain", torch.randn(3).to(torch.bfloat16))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("ids", torch.arange(30))
        self.register_buffer("plain", torch.zeros(50, 2))
        self.register_buffer("made", pattern((6, 7), dtype=torch.float32))
        self.register_buffer("number", torch.tensor(3.25, dtype=torch.float64))
        self.register_buffer("last", torch.randn(2, 5, 4, 4).to(memory_format=torch.channels_last))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        rows = x.shape[0]
        a, b = self.large(x).split([3, 5], -1)
        kept = torch.full((rows, 3), -math.inf).maximum(a)
        mixed = self.halves.float().sum() + self.brain.float().sum() + self.number
        chosen = torch.where(self.mask[0], self.ids.sum(), self.plain.sum().long())
        return kept + self.few, b * mixed, chosen, y + self.made.sum(), self.last.relu(), rows + 1


def small_program() -> Program:
    torch.manual_seed(0)
    batch = Dim("batch", min=1, max=32)
    args = (torch.randn(4, 8), torch.randn(8, 2))
    return capture(Small().eval(), args, dynamic_shapes=({0: batch}, {0: 2 * batch}))


def flat_text(program: Program) -> list[str]:
    """The calls of a program, without the names of what they read."""
    return [line for line in text(program).splitlines() if line.startswith("  %")]


def test_a_written_module_gives_the_bits_of_its_program(tmp_path: Path) -> None:
    program = small_program()
    path = write_module(program, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["constants.safetensors", "module.py"]
    assert module_problem(path, program, lambda captured: True) is None
    model, inputs, shapes = build(path)
    expected = run(program, program.samples[0])
    for a, b in zip(expected, model(*inputs), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    captured = capture(model, inputs, dynamic_shapes=shapes)
    assert len(captured.operators) == len(program.operators)
    ranges = (captured.signature.ranges, program.signature.ranges)
    assert list(ranges[0].values()) == list(ranges[1].values())
    larger = (torch.randn(7, 8), torch.randn(14, 2))
    for a, b in zip(run(program, larger), run(captured, larger), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_what_is_written_is_the_program() -> None:
    program = small_program()
    source, stored = module_source(program)
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"torch", "torch.export", "json", "pathlib"}
    assert 'self.register_buffer("plain", torch.zeros((50, 2), dtype=torch.float32))' in source
    assert 'self.register_buffer("made", pattern((6, 7), dtype=torch.float32))' in source
    assert 'torch.tensor([1.5, -0.0, float("inf")], dtype=torch.float32)' in source
    assert "linear = torch.ops.aten.linear.default(x, self.large_weight, self.large_bias)" in source
    assert "# f32[batch, 8]" in source
    assert "test_module_source.py" in source
    assert 'batch = Dim("batch", min=1, max=32)' in source
    assert "({0: batch}, {0: 2 * batch},)" in source
    assert set(stored) == {"large_weight", "halves", "ids", "last", "example_x"}


def test_a_module_without_large_tensors_needs_no_file(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).eval()
    program = capture(model, (torch.zeros(2, 3),))
    (tmp_path / "constants.safetensors").write_text("of the module before")
    path = write_module(program, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["module.py"]
    assert "load()" not in path.read_text()
    assert "json" not in path.read_text()
    assert module_problem(path, program, lambda captured: True) is None


def test_pytrees_and_constants_among_the_results_are_flat(tmp_path: Path) -> None:
    _, program = net_program()
    path = write_module(program, tmp_path)
    assert module_problem(path, program, lambda captured: True) is None
    model, inputs, _ = build(path)
    assert model(*inputs)[1] is None


def test_hostile_names_and_comments_stay_text(tmp_path: Path) -> None:
    program = small_program().clone()
    for count, node in enumerate(program.nodes):
        if node.op == "output":
            continue
        node.name = f"{HOSTILE}{count}"
        node.meta["stack_trace"] = f'File "{HOSTILE}", line 3, in f\n    {HOSTILE} + {count}'
    program.constants = {f"{HOSTILE}.{n}": c for n, c in program.constants.items()}
    for node in program.graph.find_nodes(op="get_attr"):
        node.target = f"{HOSTILE}.{node.target}"
    symbols = {symbol: HOSTILE for symbol in program.signature.symbols}
    program.signature = replace(program.signature, symbols=symbols)
    source, _ = module_source(program)
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not names & {"os", "abort"}
    path = write_module(program, tmp_path)
    assert module_problem(path, program, lambda captured: True) is None


@given(st.text(min_size=1))
def test_any_text_is_one_line_of_comment(words: str) -> None:
    line = comment(words)
    assert line.startswith("# ")
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert ast.dump(ast.parse(line)) == ast.dump(ast.parse(""))


@given(st.lists(st.text(), max_size=6))
def test_any_names_become_distinct_identifiers(names: list[str]) -> None:
    taken: set[str] = set()
    found = [identifier(name, taken) for name in names]
    assert len(set(found)) == len(names)
    for name in found:
        assert name.isidentifier()
        assert name.isascii()
        assert not name.startswith("__")
        assert not hasattr(nn.Module(), name)
        assert isinstance(ast.parse(f"{name} = 1").body[0], ast.Assign)


@pytest.mark.parametrize("name", ["class", "self", "torch", "print", "forward", "None", "inputs"])
def test_names_that_mean_something_are_avoided(name: str) -> None:
    assert identifier(name, set()) == f"{name}_1"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=6,
    )
)
def test_plain_values_are_read_back_as_they_were(value: object) -> None:
    assert eval(literal(value, {}), {"__builtins__": {"float": float}}) == value


def test_what_no_source_can_say_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a object cannot be written"):
        literal(object(), {})
    assert literal(torch.float16, {}) == "torch.float16"
    assert literal(torch.device("cpu"), {}) == "torch.device('cpu')"
    with pytest.raises(UnsupportedError, match="branch"):
        module_source(branch_program())


def test_a_number_among_the_inputs_is_refused(tmp_path: Path) -> None:
    program = small_program()
    size = next(n for n in program.operators if "sym_size" in str(n.target))
    cut = program.clone()
    (node,) = (n for n in cut.operators if n.name == size.name)
    with cut.graph.inserting_before(next(cut.nodes)):
        taken = cut.graph.placeholder("rows")
    taken.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(taken)
    with pytest.raises(UnsupportedError, match="is a number"):
        write_module(cut, tmp_path)
    assert not list(tmp_path.iterdir())


def test_operators_of_other_libraries_are_refused() -> None:
    program = small_program().clone()
    relu = next(n for n in program.operators if n.target is aten.relu.default)
    library = torch.library.Library("planish_test_module", "DEF")
    library.define("same(Tensor x) -> Tensor")
    relu.target = torch.ops.planish_test_module.same.default
    with pytest.raises(UnsupportedError, match="torch alone"):
        module_source(program)


@pytest.mark.parametrize(
    ("value", "source"),
    [
        (torch.zeros(3, 3), "torch.zeros((3, 3), dtype=torch.float32)"),
        (torch.ones((), dtype=torch.int64), "torch.ones((), dtype=torch.int64)"),
        (torch.zeros(0, 4), "torch.zeros((0, 4), dtype=torch.float32)"),
        (torch.tensor([-0.0, 0.0]), "torch.tensor([-0.0, 0.0], dtype=torch.float32)"),
        (torch.randn(17), None),
    ],
)
def test_tensors_are_written_by_what_they_hold(value: Tensor, source: str | None) -> None:
    found = tensor(value)
    if source is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(source)


@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8]))
def test_short_tensors_are_written_bit_by_bit(dtype: torch.dtype) -> None:
    value = torch.randn(5).mul(100).to(dtype)
    found = tensor(value)
    assert found is not None
    assert torch.equal(eval(found, {"torch": torch}), value)


def test_a_module_that_is_not_the_program_is_told(tmp_path: Path) -> None:
    program = static(small_program())
    assert program is not None
    path = write_module(program, tmp_path)
    good = path.read_text()
    assert module_problem(path, program, lambda captured: False) == (
        "captured again, it does not fail in the same way"
    )
    path.write_text(good.replace("torch.ops.aten.relu.default", "torch.ops.aten.neg.default"))
    assert module_problem(path, program, lambda captured: True) == (
        "it does not give the bits that the program gives"
    )
    path.write_text(good.replace("torch.ops.aten.relu.default", "torch.ops.aten.t.default"))
    assert "it does not run" in str(module_problem(path, program, lambda captured: True))
