"""fold-constants: what depends on constants only is computed once."""

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Node

from planish.ir.errors import PassError, RecipeError
from planish.ir.execute import run
from planish.ir.rewriter import Rewriter, SiteCounter
from planish.ir.tensortype import SparseLayout
from planish.passes.base import PassContext
from planish.passes.cleanup import _known
from planish.passes.cleanup.fold_constants import FoldConstants, growth_bytes
from planish.passes.recipe import Recipe
from tests.passes.cleanup.graphs import Of, captured, edited
from tests.support.check import check, refuses, run_checked, unchanged

aten = torch.ops.aten

# -- Fires ------------------------------------------------------------------------------------


def test_a_mask_is_computed_once() -> None:
    def forward(x: Tensor) -> Tensor:
        mask = torch.arange(3).unsqueeze(0) <= torch.arange(3).unsqueeze(1)
        return x.masked_fill(~mask, 0.0)

    result = check(
        Of(forward),
        (torch.randn(2, 3, 3),),
        FoldConstants(),
        """
        program(%x: f32[2, 3, 3])
          const @folded.bitwise_not: bool[3, 3]
          %0: f32[2, 3, 3] = aten.masked_fill.Scalar(%x, @folded.bitwise_not, value=0.0)
          return %0
        """,
        changes=1,
    )
    expected = torch.ones(3, 3).triu(1).bool()
    assert torch.equal(result.program.constants["folded.bitwise_not"], expected)  # type: ignore[arg-type]


def test_only_the_last_of_a_chain_is_stored_under_the_name_of_its_source() -> None:
    check(
        Of(lambda x, w: x @ (w.double() * 2).float().t(), w=torch.randn(4, 3)),
        (torch.randn(2, 3),),
        FoldConstants(),
        """
        program(%x: f32[2, 3])
          const @w: f32[3, 4]
          %0: f32[2, 4] = aten.matmul(%x, @w)
          return %0
        """,
        changes=1,
    )


def test_a_factory_that_reads_only_a_type_needs_no_constant_operand() -> None:
    check(
        Of(lambda x: x + x.new_full((3,), 2.0) * torch.ones(3)),
        (torch.randn(2, 3),),
        FoldConstants(),
        """
        program(%x: f32[batch, 3])
          const @folded.mul: f32[3]
          %0: f32[batch, 3] = aten.add.Tensor(%x, @folded.mul)
          return %0
        """,
        dynamic_shapes=({0: Dim("batch")},),
        changes=1,
    )


def test_a_view_that_changes_nothing_is_the_constant_itself() -> None:
    result = check(
        Of(lambda x, w: x + w.expand(3), w=torch.randn(3)),
        (torch.randn(2, 3),),
        FoldConstants(max_growth_bytes=0),
        changes=1,
    )
    assert list(result.program.constants) == ["w"]


def test_sizes_that_are_numbers_become_numbers() -> None:
    program = captured(Of(lambda x: x.reshape(6)), torch.randn(2, 3))

    def compute_the_size(rewriter: Rewriter, root: Node) -> None:
        x = root.args[0]
        assert isinstance(x, Node)
        sizes = [rewriter.call(aten.sym_size.int, (x, i), like=root) for i in range(2)]
        product = rewriter.call(operator.mul, tuple(sizes), like=root)
        rewriter.set_args(root, (x, [product]))

    check(
        edited(program, compute_the_size),
        (),
        FoldConstants(),
        """
        program(%x: f32[2, 3])
          %0: f32[6] = aten.reshape(%x, shape=[6])
          return %0
        """,
        changes=1,
    )


# -- Refuses ----------------------------------------------------------------------------------


def test_refuses_to_blow_up_the_file() -> None:
    module = Of(lambda x, w: x * w.repeat(4, 1), w=torch.randn(3))
    refuses(module, (torch.randn(4, 3),), FoldConstants(max_growth_bytes=35), "grow by 36 bytes")
    check(module, (torch.randn(4, 3),), FoldConstants(max_growth_bytes=36), changes=1)


def test_a_source_that_somebody_else_reads_is_not_saved() -> None:
    module = Of(lambda x, w: x @ w.t() + x @ w, w=torch.randn(3, 3))
    refuses(module, (torch.randn(2, 3),), FoldConstants(max_growth_bytes=0), "grow by 36 bytes")


def test_refuses_an_output() -> None:
    # What feeds it is folded; the output itself, and what it is a view of, are computed anew.
    module = Of(lambda x: (x + 1, (torch.arange(3) * 2 + 1).unsqueeze(0)))
    refuses(module, (torch.randn(3),), FoldConstants(), "it is an output", changes=1)


def test_refuses_random_numbers() -> None:
    module = Of(lambda x: x + torch.rand(3) * 0.0)
    refuses(module, (torch.randn(3),), FoldConstants(), "another value at every call")


def test_refuses_undefined_memory() -> None:
    module = Of(lambda x: torch.empty_like(x) * 0 + x if x.dim() > 9 else x + torch.empty(0).sum())
    refuses(module, (torch.randn(3),), FoldConstants(), "undefined memory")


def test_refuses_a_sparse_constant() -> None:
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0]).repeat(4, 1)
    program = captured(Of(lambda x, w: x @ w.t(), w=weight), torch.randn(2, 4))
    program.layouts["w"] = SparseLayout(2, 4, 1)
    refuses(program, (), FoldConstants(), "sparse<2:4, axis=1>")


def test_refuses_to_undo_a_quantization() -> None:
    library = torch.library.Library("planish_test", "FRAGMENT")
    library.define("dequantize(Tensor q) -> Tensor")
    library.impl("dequantize", lambda q: q * 0.5, "CompositeExplicitAutograd")
    dequantize = torch.ops.planish_test.dequantize
    module = Of(lambda x, q: x + dequantize(q), q=torch.ones(3, dtype=torch.int8))
    refuses(module, (torch.randn(3),), FoldConstants(), "undo the quantization")


def test_refuses_an_evaluation_that_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_known, "_SCRATCH_BYTES", 1 << 20)
    module = Of(lambda x, w: x + w.repeat(90000, 1).sum(), w=torch.ones(3))
    refuses(module, (torch.randn(3),), FoldConstants(), "takes more than 1 MiB")


def test_several_results_stay_together_where_one_must() -> None:
    """Half of a weight that others read would be a copy, so nothing of the split is folded."""
    found = refuses(
        Of(lambda x, w: x * w.chunk(2)[0] + x * w, w=torch.randn(2, 3)),
        (torch.randn(2, 3),),
        FoldConstants(max_growth_bytes=0),
        "it returns several tensors",
    )
    assert sum("grow by 12 bytes" in r.reason for r in found.refusals) == 1


def test_branches_of_conditions_stay() -> None:
    module = Of(lambda x, w: torch.cond(x.sum() > 0, lambda t: t + w, lambda t: t - w, (x,)), w=W3)
    unchanged(module, (torch.randn(3),), FoldConstants())


def test_symbolic_sizes_are_left_alone() -> None:
    dims = ({0: Dim("n")},)
    unchanged(
        Of(lambda x: x + torch.arange(x.shape[0])), (X5,), FoldConstants(), dynamic_shapes=dims
    )


def test_a_fold_that_fails_names_the_line() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.tensor([0, 2]))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(3)[self.rows].sum()  # type: ignore[index]

    program = captured(Picks(), torch.randn(3))
    program.constants["rows"] = torch.tensor([0, 7])
    with pytest.raises(PassError, match="fails on constant operands") as caught:
        FoldConstants().run(program.clone(), PassContext())
    assert "return x + torch.arange(3)[self.rows].sum()" in str(caught.value)


# -- Meaning ----------------------------------------------------------------------------------

X5, W3 = torch.randn(5), torch.ones(3)
_STEPS = {
    "t": lambda w: w.t(),
    "row": lambda w: w[:1],
    "double": lambda w: w.double(),
    "softmax": lambda w: w.softmax(-1),
    "expand": lambda w: w.unsqueeze(0).expand(2, *w.shape).sum(0),
    "chunk": lambda w: torch.cat(w.chunk(2, 0)[::-1], 0),
    "ones": lambda w: w + torch.ones_like(w),
    "eye": lambda w: w @ torch.eye(w.shape[1], dtype=w.dtype),
}


@given(st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=5), st.integers(1, 4))
def test_folding_gives_what_the_operators_give(steps: list[str], rows: int) -> None:
    weight = torch.randn(rows, 3)

    def value(w: Tensor) -> Tensor:
        for step in steps:
            w = _STEPS[step](w)
        return w

    result = run_checked(
        captured(Of(lambda x, w: x * value(w).sum(), w=weight), X5), FoldConstants()
    )
    (constant,) = result.program.constants.values()
    assert torch.equal(constant, value(weight).sum())  # type: ignore[arg-type]


def test_growth_is_what_the_result_takes_beyond_what_it_frees() -> None:
    assert growth_bytes(16, {}) == 16
    assert growth_bytes(16, {"v": 8, "w": 2}) == 6


def test_what_is_freed_counts_once() -> None:
    """Two copies of a weight in other layouts: one takes its place, the other is growth."""
    module = Of(lambda x, w: x @ w.t() + x @ w.flip(0), w=torch.randn(3, 3))
    args = (torch.randn(2, 3),)
    refuses(module, args, FoldConstants(max_growth_bytes=0), "grow by 36 bytes", changes=0)
    check(module, args, FoldConstants(max_growth_bytes=36), changes=2)
    thirds = Of(lambda x, w: x @ w[:1].t() + x @ w[1:2].t() + x @ w[2:].t(), w=torch.randn(3, 3))
    check(thirds, args, FoldConstants(max_growth_bytes=0), changes=3)


# -- Neighbors --------------------------------------------------------------------------------


def test_a_shared_weight_stays_and_the_copy_has_its_own_memory() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    module = Of(lambda x, w: x @ w.t() + (x * w[:2].reshape(2, 3)).sum(), w=weight)
    result = check(module, (torch.randn(2, 3),), FoldConstants(), changes=2)
    assert "w" in result.program.constants
    storages = {c.untyped_storage().data_ptr() for c in result.program.constants.values()}  # type: ignore[operator]
    assert len(storages) == 2
    assert weight.untyped_storage().data_ptr() not in storages


def test_every_fold_is_a_site_of_its_own() -> None:
    program = captured(Of(lambda x: x * torch.ones(3) + torch.arange(3)), torch.randn(3))
    context = PassContext(sites=SiteCounter(limit=1))
    result = FoldConstants().run(program.clone(), context)
    assert [c.rule for c in result.changes] == ["FoldConstant"]
    assert context.sites.count == 2
    sample = program.samples[0]
    assert torch.equal(run(program, sample)[0], run(result.program, sample)[0])


def test_the_option_round_trips_and_is_checked() -> None:
    (pass_,) = Recipe.parse("fold-constants{max_growth_bytes=7}").passes
    assert pass_ == FoldConstants(max_growth_bytes=7)
    with pytest.raises(RecipeError, match="max_growth_bytes is -1"):
        FoldConstants(max_growth_bytes=-1)
