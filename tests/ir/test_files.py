"""Programs on disk: nothing is lost, equal programs are equal files, nothing is half-written."""

import json
import math
import subprocess
import sys
import types
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.ir import Program, Rewriter, capture, load, save, text
from planish.ir.errors import ExportError, UnsupportedError, UsageError
from planish.ir.tensortype import SparseLayout
from tests.support.nets import Branch, assert_same, branch_program, held, net_inputs, net_program

aten = torch.ops.aten


def round_trip(program: Program, folder: Path) -> Program:
    path = folder / "program.pt2"
    save(program, path)
    return load(path)


def assert_kept(program: Program, again: Program) -> None:
    """Text, values, names, order, signature, samples, provenance: all there."""
    assert text(again, values=True) == text(program, values=True)
    assert [n.name for n in again.nodes] == [n.name for n in program.nodes]
    assert again.signature == program.signature
    assert list(again.constants) == list(program.constants)
    assert again.remarks == program.remarks
    assert again.layouts == program.layouts
    for a, b in zip(program.nodes, again.nodes, strict=True):
        for key in ("from", "torch_fn", "nn_module_stack"):
            assert a.meta.get(key) == b.meta.get(key)
    assert len(again.samples) == len(program.samples)
    for sample, other in zip(program.samples, again.samples, strict=True):
        assert_same(sample, other)


def test_nothing_is_lost(tmp_path: Path) -> None:
    model, program = net_program()
    program.remarks = ("one", "two")
    again = round_trip(program, tmp_path)
    assert_kept(program, again)
    args, kwargs = net_inputs(7)
    assert_same(model(*args, **kwargs), again(*args, **kwargs))


def test_provenance_of_a_rewrite_and_a_sparse_layout_are_kept(tmp_path: Path) -> None:
    _, program = net_program()
    rewriter = Rewriter(program.clone(), "prune")
    linear = next(n for n in rewriter.program.operators if n.target is aten.linear.default)
    with rewriter.site("mask", linear):
        weight = torch.tensor([[1.0, 2, 0, 0]] * 4)
        layout = SparseLayout(2, 4, 1)
        node = rewriter.constant(weight, "second.weight", like=linear, layout=layout)
        args = (linear.args[0], node, linear.args[2])
        rewriter.replace(linear, rewriter.call(linear.target, args, like=linear))
    changed = rewriter.finish()
    again = round_trip(changed, tmp_path)
    assert_kept(changed, again)
    assert "sparse<2:4, axis=1>" in text(again)
    assert any(n.meta.get("from") == ("prune", "mask", (linear.name,)) for n in again.operators)


def test_source_lines_are_kept_with_packages_shortened(tmp_path: Path) -> None:
    _, program = net_program()
    again = round_trip(program, tmp_path)
    for a, b in zip(program.operators, again.operators, strict=True):
        before, after = a.meta["stack_trace"], b.meta["stack_trace"]
        assert before.splitlines()[-1] == after.splitlines()[-1]
        assert ("tests/support/nets.py" in after) == ("tests/support/nets.py" in before)
        assert "site-packages" not in after
    assert sum("nets.py" in n.meta["stack_trace"] for n in again.operators) > 5
    saved_again = round_trip(again, tmp_path)
    assert saved_again.operators[0].meta["stack_trace"] == again.operators[0].meta["stack_trace"]


def test_branches_and_the_order_inside_them_are_kept(tmp_path: Path) -> None:
    program = branch_program()
    again = round_trip(program, tmp_path)
    assert_kept(program, again)
    for sign in (1.0, -1.0):
        x = torch.full((2, 3), sign)
        torch.testing.assert_close(again(x), Branch()(x))


class Late(nn.Module):
    """Items of a split that are taken late and twice; sizes computed from sizes."""

    def forward(self, x: Tensor) -> Any:
        first, second = x.chunk(2)
        a = first.relu()
        values, indices = a.max(1)
        n = x.shape[0] * 2 + 1
        return second, indices, a.new_zeros(n), n, x.shape[0] / 2, values


def test_the_order_of_items_and_symbolic_numbers_are_kept(tmp_path: Path) -> None:
    shapes = ({0: 2 * Dim("half"), 1: Dim("width", max=64)},)
    program = capture(Late().eval(), (torch.randn(6, 3),), dynamic_shapes=shapes)
    again = round_trip(program, tmp_path)
    assert_kept(program, again)
    x = torch.randn(8, 5)
    assert_same(Late()(x), again(x))


def test_a_loaded_program_is_rewritten_like_the_original(tmp_path: Path) -> None:
    def rewrite(program: Program) -> str:
        rewriter = Rewriter(program, "test")
        for node in list(program.operators):
            if node.target is aten.linear.default:
                with rewriter.site("widen", node):
                    x = node.args[0]
                    twice = rewriter.call(aten.cat.default, ([x, x],), like=node)
                    rewriter.set_args(node, (twice, *node.args[1:]))
                    rows = rewriter.call(aten.sym_size.int, (x, 0), like=node)
                    back = rewriter.call(aten.narrow.default, (node, 0, 0, rows), like=node)
                    for user in [u for u in node.users if u is not back]:
                        rewriter.set_args(
                            user,
                            [back if a is node else a for a in user.args],
                        )
        return text(rewriter.finish())

    _, program = net_program()
    again = round_trip(program, tmp_path)
    assert rewrite(again) == rewrite(program.clone())


class Arithmetic(nn.Module):
    """Numbers that torch's JSON has no function for, and a list of ints and floats."""

    def forward(self, x: Tensor) -> Any:
        n = x.shape[0]
        half, up = math.floor(n / 2.5), math.ceil(n / 2.5)
        other = round(n / 4)
        total = torch.sym_sum([n, half, up])
        return x + half, up, other, abs(half - n), total


def test_functions_on_numbers_that_torchs_json_lacks_are_kept(tmp_path: Path) -> None:
    program = capture(Arithmetic().eval(), (torch.randn(9),), dynamic_shapes=({0: Dim("n")},))
    names = {str(getattr(n.target, "__name__", "")) for n in program.operators}
    assert {"floor", "ceil", "round"} <= names
    again = round_trip(program, tmp_path)
    assert_kept(program, again)
    x = torch.randn(14)
    assert_same(Arithmetic()(x), again(x))


def test_keyword_arguments_of_sizes_and_mixed_lists_are_kept(tmp_path: Path) -> None:
    class Up(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            up: Tensor = torch.ops.aten.upsample_nearest2d.vec(x, None, [2, 2.0])
            return up * x.shape[0]

    program = capture(Up().eval(), (torch.ones(3, 1, 2, 2),), dynamic_shapes=({0: Dim("n")},))
    program = program.clone()
    for node in program.operators:
        if node.target is aten.sym_size.int:
            node.args, node.kwargs = node.args[:1], {"dim": node.args[1]}
        elif node.target is aten.upsample_nearest2d.vec:
            node.args = (node.args[0], None, [2, 2.0])
    again = round_trip(program, tmp_path)
    torch.testing.assert_close(again(torch.ones(4, 1, 2, 2)), torch.full((4, 1, 4, 4), 4.0))
    assert "dim=0" in text(again)
    assert "[2.0, 2.0]" in text(again)


# -- structures -----------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Structured(nn.Module):
    def forward(self, x: Tensor, flag: bool = True) -> Any:
        pair = Pair(x, x + 1)
        return {"pair": pair, "best": torch.max(x, 0), "plain": (None, [1.5, "word", x * 2])}


def test_structures_of_named_tuples_and_constants_are_kept(tmp_path: Path) -> None:
    program = capture(Structured().eval(), (torch.randn(3),))
    again = round_trip(program, tmp_path)
    assert_kept(program, again)
    result = again(torch.ones(3))
    assert isinstance(result["pair"], Pair)
    assert isinstance(result["best"], torch.return_types.max)
    assert result["plain"][1][:2] == [1.5, "word"]


def test_an_output_class_unknown_to_the_process_becomes_a_dict_with_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("gone_tomorrow")

    @dataclass
    class Result:
        logits: Tensor
        hidden: Tensor | None = None

    Result.__module__, Result.__qualname__ = "gone_tomorrow", "Result"
    module.Result = Result  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gone_tomorrow", module)
    torch.export.register_dataclass(Result)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Result(x + 1)

    program = capture(Model().eval(), (torch.zeros(2),))
    again = round_trip(program, tmp_path)
    assert isinstance(again(torch.zeros(2)), Result)
    assert again.remarks == ()
    monkeypatch.delitem(sys.modules, "gone_tomorrow")
    again = load(tmp_path / "program.pt2")
    assert again(torch.zeros(2)).keys() == {"logits"}
    assert again.signature.output_names == ("logits",)
    assert "import gone_tomorrow before loading" in again.remarks[-1]


def test_a_named_tuple_unknown_to_the_process_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("gone_tuple")
    Two = namedtuple("Two", ["a", "b"])
    Two.__module__ = "gone_tuple"
    vars(module)["Two"] = Two
    monkeypatch.setitem(sys.modules, "gone_tuple", module)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Two(x, x * 2)

    save(capture(Model().eval(), (torch.ones(2),)), tmp_path / "p.pt2")
    monkeypatch.delitem(sys.modules, "gone_tuple")
    torch.testing.assert_close(load(tmp_path / "p.pt2")(torch.ones(2)).b, torch.full((2,), 2.0))


# -- the file -------------------------------------------------------------------------------------


def test_equal_programs_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.pt2", "b.pt2"):
        save(net_program()[1], tmp_path / name)
    save(load(tmp_path / "a.pt2"), tmp_path / "c.pt2")
    first = (tmp_path / "a.pt2").read_bytes()
    assert (tmp_path / "b.pt2").read_bytes() == first
    assert (tmp_path / "c.pt2").read_bytes() == first


def test_a_fresh_process_reads_it(tmp_path: Path) -> None:
    save(net_program()[1], tmp_path / "p.pt2")
    code = (
        "import sys; from planish.ir import load, text; p = load(sys.argv[1]);"
        "print(text(p, values=True), end='')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "p.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == text(net_program()[1], values=True)


def test_the_program_saved_is_left_alone(tmp_path: Path) -> None:
    program = branch_program()
    before, orders = text(program, values=True), [n.name for n in program.nodes]
    metas = [dict(n.meta) for n in program.nodes]
    save(program, tmp_path / "p.pt2")
    assert text(program, values=True) == before
    assert [n.name for n in program.nodes] == orders
    assert [n.meta.keys() for n in program.nodes] == [m.keys() for m in metas]


def test_a_name_without_the_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.pt2"):
        save(net_program()[1], tmp_path / "program.pt")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "p.pt2"
    path.write_bytes(b"old")
    program = held({"weight": torch.ones(2)})
    program.constants["weight"] = torch.ones(2, device="meta")
    with pytest.raises(UnsupportedError, match="no plain values"):
        save(program, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_missing_folder_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="could not be written"):
        save(net_program()[1], tmp_path / "none" / "p.pt2")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("planish.ir.archive._write_entry", full)
    with pytest.raises(ExportError, match="No space left"):
        save(net_program()[1], tmp_path / "p.pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_a_serialized_form_is_named(tmp_path: Path) -> None:
    _, program = net_program()
    program = program.clone()
    node = program.operators[0]
    node.target = json.dumps
    with pytest.raises(UnsupportedError, match="cannot hold this graph"):
        save(program, tmp_path / "p.pt2")
    assert list(tmp_path.iterdir()) == []


class Defaults(nn.Module):
    def forward(self, x: Tensor, by: Any = len, n: int = 3, to: Any = print, m: float = 0.5) -> Any:
        return x * n * m


def test_defaults_that_are_values_are_kept_and_others_left_out(tmp_path: Path) -> None:
    program = capture(Defaults().eval(), (torch.ones(2),))
    assert list(program.signature.defaults) == ["by", "n", "to", "m"]
    save(program, tmp_path / "p.pt2")
    assert load(tmp_path / "p.pt2").signature.defaults == {"n": 3, "m": 0.5}


class Repeats(nn.Module):
    def forward(self, x: Tensor, n: int) -> Tensor:
        return x.expand(n, 3) * 2


def test_samples_keep_their_numbers(tmp_path: Path) -> None:
    shapes: Any = (None, torch.export.Dim.DYNAMIC)
    program = capture(Repeats().eval(), (torch.randn(1, 3), 5), dynamic_shapes=shapes)
    program.samples = (*program.samples, (torch.randn(1, 3), 7))
    save(program, tmp_path / "p.pt2")
    again = load(tmp_path / "p.pt2")
    assert [sample[1] for sample in again.samples] == [5, 7]
    for (x, n), (y, _) in zip(again.samples, program.samples, strict=True):
        assert torch.equal(x, y)
        assert again(x, n).shape == (n, 3)


def test_ranges_that_torch_knows_are_kept(tmp_path: Path) -> None:
    shapes = ({0: Dim("batch", min=3, max=64), 1: Dim("rest")},)
    program = capture(nn.ReLU().eval(), (torch.randn(5, 6),), dynamic_shapes=shapes)
    again = round_trip(program, tmp_path)

    def ranges(p: Program) -> list[tuple[str, str]]:
        table: Any = p.fake_mode.shape_env
        sizes = p.placeholders[0].meta["val"].shape
        found = [table.var_to_range[size.node.expr] for size in sizes]
        return [(str(bounds.lower), str(bounds.upper)) for bounds in found]

    assert ranges(again) == ranges(program)
    assert ranges(again)[0] == ("3", "64")


def test_a_constant_that_nobody_reads_is_not_written(tmp_path: Path) -> None:
    program = held({"read": torch.ones(3)})
    program.constants["unread"] = torch.ones(100_000)
    assert list(round_trip(program, tmp_path).constants) == ["read"]
    assert (tmp_path / "program.pt2").stat().st_size < 100_000
    assert list(program.constants) == ["read", "unread"]
