"""The error of every value a lossy pass rewrote: known answers, and bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node
from torch.nn import functional

from planish.ir import Change, Program, Rewriter, capture
from planish.ir.compare import Fidelity, measure
from planish.ir.errors import UsageError, VerificationError
from planish.ir.execute import run
from planish.passes.base import PassContext
from planish.passes.debug.attribution import attribute, with_errors
from planish.passes.steps import NodeError
from planish.tools.bench.live_bytes import LiveBytes
from tests.support.example_passes import RoundWeights

aten = torch.ops.aten
Edit = Callable[[Rewriter, Program], None]


def mlp() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return capture(net, (torch.randn(5, 8),), dynamic_shapes=({0: Dim("batch")},))


def edited(before: Program, *edits: tuple[str, str, Edit]) -> tuple[Program, tuple[Change, ...]]:
    """A program after edits, each of them one site: rule, name of the root, what to do."""
    after = before.clone()
    rewriter = Rewriter(after, "test")
    for rule, root, edit in edits:
        with rewriter.site(rule, named(after, root)):
            edit(rewriter, after)
    return rewriter.finish(), tuple(rewriter.changes)


def named(program: Program, name: str) -> Node:
    return next(n for n in program.graph.nodes if n.name == name)


def rounded(constant: str, step: float = 1 / 8) -> Edit:
    def edit(rewriter: Rewriter, program: Program) -> None:
        node = next(n for n in program.graph.find_nodes(op="get_attr") if n.target == constant)
        value = program.constant(node)
        assert value is not None
        new = rewriter.constant((value / step).round() * step, constant, like=node)
        rewriter.replace(node, new)

    return edit


def calling(name: str, target: Any, *more: Any) -> Edit:
    """Replace a unary operator by another."""

    def edit(rewriter: Rewriter, program: Program) -> None:
        node = named(program, name)
        rewriter.replace(node, rewriter.call(target, (node.args[0], *more), like=node))

    return edit


def errors(
    before: Program, after: Program, changes: Sequence[Change], *batches: Tensor, **more: Any
) -> dict[str, NodeError]:
    """By ``site@node``."""
    inputs = [(b,) for b in batches] or before.samples
    found = attribute(more.pop("original", before), before, after, changes, inputs, **more)
    return {f"{e.site}@{e.node}": e for e in found}


def values(program: Program, x: Tensor) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    run(program, (x,), observe=lambda node, value: seen.update({node.name: value}))
    return seen


def tensor(program: Program, name: str) -> Tensor:
    found = program.constants[name]
    assert isinstance(found, Tensor)
    return found


def off(reference: Any, value: Any) -> Fidelity:
    return measure((reference,), (value,))


# -- known answers --------------------------------------------------------------------------------


def test_a_rounded_weight_counts_at_the_layer_that_reads_it() -> None:
    before = mlp()
    after, changes = edited(before, ("round", "p_0_weight", rounded("0.weight")))
    x = before.samples[0][0]
    (found,) = attribute(before, before, after, changes, before.samples)
    w, b = tensor(before, "0.weight"), tensor(before, "0.bias")
    expected = off(functional.linear(x, w, b), functional.linear(x, (w * 8).round() / 8, b))
    assert (found.own, found.local, found.cumulative) == (expected, expected, expected)
    assert (found.site, found.rule, found.node, found.replaces) == (1, "round", "linear", "linear")
    assert found.constant == "0.weight"
    assert not found.own.equal


def test_each_of_two_constants_of_one_layer_has_an_error_of_its_own() -> None:
    before = mlp()
    after, changes = edited(
        before,
        ("round", "p_0_weight", rounded("0.weight")),
        ("round", "p_0_bias", rounded("0.bias", 1.0)),
    )
    x = before.samples[0][0]
    found = errors(before, after, changes)
    w, b = tensor(before, "0.weight"), tensor(before, "0.bias")
    good = functional.linear(x, w, b)
    w2, b2 = (w * 8).round() / 8, b.round()
    assert found["1@linear"].own == off(good, functional.linear(x, w2, b))
    assert found["2@linear"].own == off(good, functional.linear(x, w, b2))
    both = off(good, functional.linear(x, w2, b2))
    assert {e.local for e in found.values()} == {both}


def test_who_inherits_noise_makes_none() -> None:
    before = mlp()
    after, changes = edited(
        before,
        ("round", "p_0_weight", rounded("0.weight")),
        ("clamp", "relu", calling("relu", aten.clamp_min.default, 0)),
    )
    found = errors(before, after, changes)
    maker, heir = found["1@linear"], found["2@clamp_min_default"]
    assert heir.own == Fidelity(math.inf, 1.0, 0.0, 0.0, equal=True)
    assert heir.local.rel_l2 > 0
    assert heir.replaces == "relu"
    assert maker.own == maker.local


def test_cumulative_is_against_the_original_and_local_is_not() -> None:
    original = mlp()
    x = original.samples[0][0]
    before, _ = edited(original, ("round", "p_0_weight", rounded("0.weight")))
    after, changes = edited(before, ("clamp", "relu", calling("relu", aten.clamp_min.default, 0.2)))
    found = errors(before, after, changes, original=original)["1@clamp_min_default"]
    first, second, third = (values(p, x) for p in (original, before, after))
    new = third["clamp_min_default"]
    assert found.local == found.own == off(second["relu"], new)
    assert found.cumulative == off(first["relu"], new)
    assert found.cumulative != found.local
    lost = errors(before, after, changes, original=original, lineage={"linear": "linear"})
    assert lost["1@clamp_min_default"].cumulative is None


def test_a_replacement_that_is_replaced_again_stands_for_the_first() -> None:
    before = mlp()
    after, changes = edited(
        before,
        ("first", "relu", calling("relu", aten.clamp_min.default, 0.1)),
        ("second", "linear_1", calling("clamp_min_default", aten.clamp_min.default, 0.3)),
    )
    found = errors(before, after, changes)
    x = before.samples[0][0]
    old, new = values(before, x), values(after, x)
    assert list(found) == ["2@clamp_min_default_1"]
    (only,) = found.values()
    assert (only.replaces, only.rule) == ("relu", "second")
    assert only.own == off(old["relu"], new["clamp_min_default_1"])


def test_of_a_chain_that_stays_each_link_has_its_own_error() -> None:
    before = mlp()

    def after_it(name: str, factor: float) -> Edit:
        def edit(rewriter: Rewriter, program: Program) -> None:
            node = named(program, name)
            rewriter.insert_before(node.next)
            rewriter.replace(node, rewriter.call(aten.mul.Tensor, (node, factor), like=node))

        return edit

    after, changes = edited(
        before,
        ("first", "relu", after_it("relu", 1.1)),
        ("second", "relu", after_it("mul_tensor", 1.01)),
    )
    found = errors(before, after, changes)
    assert found["1@mul_tensor"].own.rel_l2 == pytest.approx(0.1)
    assert found["2@mul_tensor_1"].own.rel_l2 == pytest.approx(0.01, rel=1e-3)
    assert found["2@mul_tensor_1"].local.rel_l2 == pytest.approx(1.1 * 1.01 - 1, rel=1e-3)
    assert {e.replaces for e in found.values()} == {"relu"}


def test_a_node_that_was_left_out_is_measured_by_what_is_read_instead() -> None:
    before = mlp()
    after, changes = edited(
        before,
        ("drop", "relu", lambda r, p: r.replace(named(p, "relu"), named(p, "linear"))),
    )
    x = before.samples[0][0]
    old = values(before, x)
    (found,) = errors(before, after, changes).values()
    assert (found.node, found.replaces) == ("linear", "relu")
    assert found.own == found.local == off(old["relu"], old["linear"])


def test_a_site_of_many_nodes_is_computed_as_a_whole() -> None:
    before = mlp()

    def twice(rewriter: Rewriter, program: Program) -> None:
        node = named(program, "relu")
        low = rewriter.call(aten.clamp_min.default, (node.args[0], 0), like=node)
        rewriter.replace(node, rewriter.call(aten.mul.Tensor, (low, 1.5), like=node))

    after, changes = edited(
        before, ("round", "p_0_weight", rounded("0.weight")), ("twice", "relu", twice)
    )
    found = errors(before, after, changes)
    assert list(found) == ["1@linear", "2@mul_tensor"]
    assert found["2@mul_tensor"].own.rel_l2 == pytest.approx(0.5)
    assert found["2@mul_tensor"].local.rel_l2 != pytest.approx(0.5, rel=1e-3)


def test_a_constant_counts_behind_what_is_computed_from_constants_only() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ (self.w + 1).t()).relu()

    before = capture(Transposed().eval(), (torch.randn(5, 3),))
    after, changes = edited(before, ("round", "p_w", rounded("w", 1.0)))
    (found,) = errors(before, after, changes).values()
    assert (found.node, found.constant) == ("matmul", "w")
    x = before.samples[0][0]
    assert found.own == off(values(before, x)["matmul"], values(after, x)["matmul"])


def test_values_of_another_shape_count_where_shapes_agree_again() -> None:
    before = mlp()

    def halve(rewriter: Rewriter, program: Program) -> None:
        """Keep every second hidden channel."""
        first, relu, second = (named(program, n) for n in ("linear", "relu", "linear_1"))
        kept = [
            tensor(program, n)[part]
            for n, part in (
                ("0.weight", slice(0, 16, 2)),
                ("0.bias", slice(0, 16, 2)),
                ("2.weight", (slice(None), slice(0, 16, 2))),
            )
        ]
        nodes = [
            rewriter.constant(t.clone(), name)
            for t, name in zip(kept, ("w0", "b0", "w1"), strict=True)
        ]
        thin = rewriter.call(aten.linear.default, (first.args[0], *nodes[:2]), like=first)
        low = rewriter.call(aten.relu.default, (thin,), like=relu)
        args = (low, nodes[2], second.args[2])
        whole = rewriter.call(aten.linear.default, args, like=second)
        rewriter.replace(second, whole)

    after, changes = edited(before, ("prune", "linear_1", halve))
    (found,) = errors(before, after, changes).values()
    assert found.replaces == "linear_1"
    x = before.samples[0][0]
    assert found.own == off(*(run(p, (x,))[0] for p in (before, after)))


# -- kinds of values and batches ------------------------------------------------------------------


def test_batches_of_any_size_count_as_one() -> None:
    before = mlp()
    after, changes = edited(before, ("round", "p_0_weight", rounded("0.weight")))
    batches = [torch.randn(2, 8), 20 * torch.randn(7, 8), torch.randn(1, 8)]
    (parts,) = errors(before, after, changes, *batches).values()
    (whole,) = errors(before, after, changes, torch.cat(batches)).values()
    assert parts.own.sqnr_db == pytest.approx(whole.own.sqnr_db)
    assert parts.own.max_abs == pytest.approx(whole.own.max_abs)
    with pytest.raises(UsageError, match="there was no batch"):
        attribute(before, before, after, changes, [])


def test_values_that_are_no_longer_finite_are_the_worst() -> None:
    before = mlp()
    after, changes = edited(
        before,
        ("inverse", "relu", calling("relu", aten.reciprocal.default)),
        ("log", "linear_1", calling("reciprocal_default", aten.log.default)),
    )
    (found,) = errors(before, after, changes).values()
    assert found.own.sqnr_db == found.local.sqnr_db == -math.inf
    assert found.own.to_dict() == {
        "sqnr_db": None, "cosine": 0.0, "max_abs": None, "rel_l2": None, "equal": False,
    }  # fmt: skip


def test_operators_with_several_outputs_are_measured_part_by_part() -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            found = (2 * x).sort(dim=1)
            return found.values + 1, found.indices

    before = capture(Sorts().eval(), (torch.randn(3, 9),))

    def backwards(rewriter: Rewriter, program: Program) -> None:
        node = named(program, "sort")
        rewriter.replace(node, rewriter.call(node.target, (node.args[0], 1, True), like=node))

    after, changes = edited(before, ("backwards", "sort", backwards))
    found = errors(before, after, changes)["1@sort_default"]
    good = (2 * before.samples[0][0]).sort(dim=1)
    assert found.own == measure(tuple(good), tuple(part.flip(1) for part in good))


def test_a_rewrite_in_a_narrower_type_is_fed_in_it() -> None:
    before = mlp()

    def narrow(rewriter: Rewriter, program: Program) -> None:
        node = named(program, "relu")
        half = rewriter.call(aten.to.dtype, (node.args[0], torch.bfloat16), like=node)
        low = rewriter.call(aten.relu.default, (half,), like=node)
        rewriter.replace(node, rewriter.call(aten.to.dtype, (low, torch.float32), like=node))

    after, changes = edited(before, ("narrow", "relu", narrow))
    (found,) = errors(before, after, changes).values()
    good = values(before, before.samples[0][0])["linear"]
    assert found.own == off(good.relu(), good.bfloat16().relu().float())


def test_a_lie_about_a_shape_is_an_error_of_the_pass() -> None:
    before = mlp()

    def narrower(rewriter: Rewriter, program: Program) -> None:
        node = named(program, "relu")
        new = rewriter.call(aten.slice.Tensor, (node.args[0], 1, 0, 8), like=node)
        new.meta["val"] = node.meta["val"]
        rewriter.replace(node, new)

    after, changes = edited(before, ("lie", "relu", narrower))
    with pytest.raises(VerificationError, match=r"stands for relu, but a value has shape \[5, 8\]"):
        attribute(before, before, after, changes, before.samples)


def test_the_worst_own_error_of_a_site_is_written_on_its_change() -> None:
    before = mlp()
    done = RoundWeights(step=1 / 8).run(before.clone(), PassContext())
    found = attribute(before, before, done.program, done.changes, before.samples)
    for change, error in zip(with_errors(done.changes, found), found, strict=True):
        assert change.error == {"sqnr_db": error.own.sqnr_db, "rel_l2": error.own.rel_l2}
    assert with_errors(done.changes, ()) == done.changes


# -- memory ---------------------------------------------------------------------------------------


def test_the_sweep_of_a_deep_program_holds_few_values() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(100) for m in (nn.Linear(8, 8), nn.Tanh())]
    original = capture(nn.Sequential(*layers).eval(), (torch.randn(64, 8),))
    before = RoundWeights(step=1 / 64).run(original.clone(), PassContext()).program
    done = RoundWeights(step=1 / 32).run(before.clone(), PassContext())
    with LiveBytes() as live:
        found = attribute(original, before, done.program, done.changes, original.samples)
    assert len(found) == 200  # a weight and a bias of every layer
    one = 64 * 8 * 4
    # Two values of each of three programs, one that is computed alone, and what measuring one
    # pair takes in float64; a fraction of the 200 values that each program computes.
    assert live.peak <= 20 * one
    assert live.made > 3 * 200 * one
