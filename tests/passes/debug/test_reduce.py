"""The search ends at a program that fails, and no longer does without any of its operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from planish.ir import Program, capture, load, text
from planish.ir.errors import PlanishError, UsageError
from planish.ir.execute import run
from planish.ir.ops import is_op
from planish.ir.verify import verify
from planish.passes.base import Pass, PassContext
from planish.passes.calibrate import Spool
from planish.passes.debug import reduce_steps as steps
from planish.passes.debug.bundle import failure_of, load_bundle, replay
from planish.passes.debug.reduce import reduce_program, reduction
from planish.passes.debug.reduce_bundle import NotReproducedError, reduce_bundle
from planish.passes.debug.reduce_ddmin import ddmin
from planish.passes.debug.reduce_search import Progress
from planish.passes.debug.reduce_values import Recorded
from planish.passes.debug.reproduce import Reproduce
from planish.passes.debug.subgraph import closure, induced, without
from planish.passes.instruments import default_instruments
from planish.passes.pipeline import run_pipeline
from planish.passes.recipe import Recipe
from tests.passes.debug.faulty import Calibrated, Faulty
from tests.support.example_passes import SwapActivation

aten = torch.ops.aten


class Blocks(nn.Module):
    """Blocks of a norm, two linear layers and an activation between them, on a dynamic batch."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(count))
        self.wide = nn.ModuleList(nn.Linear(8, 16) for _ in range(count))
        self.back = nn.ModuleList(nn.Linear(16, 8) for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for norm, wide, back in zip(self.norms, self.wide, self.back, strict=True):
            x = x + back(wide(norm(x)).relu())
        left, right = x.reshape(x.shape[0] * 2, 4).split(2, -1)
        return left * right, x


@functools.cache
def blocks_program() -> Program:
    torch.manual_seed(0)
    shapes = ({0: Dim("batch", min=1, max=64)},)
    return capture(Blocks(6).eval(), (torch.randn(3, 8),), dynamic_shapes=shapes)


def fails_with(pass_: Pass) -> Callable[[Program], bool]:
    """Whether the failure of a pass on the blocks shows on another program."""

    def failure(program: Program) -> str | None:
        try:
            run_pipeline(program, Recipe(passes=(pass_,)), None, default_instruments())
        except PlanishError as error:
            return failure_of(error).signature
        return None

    wanted = failure(blocks_program())
    assert wanted is not None
    return lambda program: failure(program) == wanted


def assert_minimal(program: Program, fails: Callable[[Program], bool]) -> None:
    """It fails, is legal, and fails without none of its operators."""
    verify(program)
    assert fails(program)
    names = frozenset(n.name for n in program.operators)
    for name in names:
        rest = without(program, names, {name})
        if rest:
            assert not fails(induced(program, rest, Recorded(program))), name


# -- ddmin ----------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 39), min_size=1), st.integers(1, 40))
def test_ddmin_finds_exactly_the_items_that_must_be_there(needed: set[int], size: int) -> None:
    items = [f"n{i}" for i in range(max(size, *needed) + 1)]
    wanted = {f"n{i}" for i in needed}
    assert ddmin(items, lambda kept: wanted <= kept) == [i for i in items if i in wanted]


@given(
    st.lists(st.sets(st.integers(0, 19), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_ddmin_is_one_minimal_where_one_of_several_sets_is_enough(choices: list[set[int]]) -> None:
    items = [f"n{i}" for i in range(20)]
    causes = [{f"n{i}" for i in choice} for choice in choices]

    def fails(kept: frozenset[str]) -> bool:
        return any(cause <= kept for cause in causes)

    found = frozenset(ddmin(items, fails))
    assert fails(found)
    assert not any(fails(found - {item}) for item in found if len(found) > 1)


def test_ddmin_keeps_one_item_where_everything_fails() -> None:
    assert len(ddmin(["a", "b", "c", "d"], lambda kept: True)) == 1


def test_ddmin_asks_only_about_legal_sets() -> None:
    program = blocks_program()
    names = [n.name for n in program.operators]
    asked: list[frozenset[str]] = []

    def fails(kept: frozenset[str]) -> bool:
        asked.append(kept)
        return "getitem_1" in kept

    found = ddmin(
        names,
        fails,
        grown=lambda chunk: closure(program, chunk),
        shrunk=lambda keep, drop: without(program, keep, drop),
    )
    assert set(found) == {"split", "getitem_1"}
    assert all(closure(program, kept) == kept for kept in asked)


# -- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pass_", "left"),
    [
        (Faulty(how="crash"), ["layer_norm", "linear"]),
        (Faulty(how="verifier"), ["layer_norm", "linear"]),
        (Faulty(how="numbers"), ["layer_norm", "linear"]),
        (SwapActivation(to="gelu"), ["relu"]),
    ],
    ids=lambda value: getattr(value, "how", None) or getattr(value, "name", None),
)
def test_failures_are_reduced_to_what_they_need(pass_: Pass, left: list[str]) -> None:
    fails = fails_with(pass_)
    program = reduce_program(blocks_program(), fails)
    assert [str(n.target).split(".")[1] for n in program.operators] == left
    assert_minimal(program, fails)


def test_an_anchor_saves_tries() -> None:
    program, fails = blocks_program(), fails_with(SwapActivation(to="gelu"))
    place = reduction(program, fails, anchors=["no_such_node", "relu_3"])
    nowhere = reduction(program, fails)
    assert [n.name for n in place.program.operators] == ["relu_3"]
    assert place.tries < nowhere.tries
    assert not place.exhausted


def test_a_wrong_anchor_costs_tries_only() -> None:
    def fails(program: Program) -> bool:
        return {"layer_norm", "layer_norm_5"} <= {n.name for n in program.operators}

    found = reduction(blocks_program(), fails, anchors=["relu_3"])
    assert {n.name for n in found.program.operators} == {"layer_norm", "layer_norm_5"}


def test_sizes_become_static_where_the_failure_allows_it() -> None:
    program = reduce_program(blocks_program(), fails_with(SwapActivation(to="gelu")))
    assert text(program).splitlines()[0] == "program(%linear: f32[3, 16])"
    assert not program.signature.symbols

    def needs_sizes(candidate: Program) -> bool:
        return bool(candidate.signature.symbols) and any(
            is_op(n, aten.relu.default) for n in candidate.operators
        )

    program = reduce_program(blocks_program(), needs_sizes)
    assert "f32[batch, 16]" in text(program)
    verify(program)


def test_no_more_programs_are_tried_than_allowed() -> None:
    asked = 0
    fails = fails_with(Faulty(how="crash"))

    def counting(program: Program) -> bool:
        nonlocal asked
        asked += 1
        return fails(program)

    found = reduction(blocks_program(), counting, max_tries=4)
    assert found.exhausted
    assert asked == found.tries == 4
    assert fails(found.program)
    with pytest.raises(UsageError, match="max_tries is 0"):
        reduction(blocks_program(), fails, max_tries=0)


def test_no_set_of_operators_is_tried_twice() -> None:
    seen: list[frozenset[str]] = []

    def fails(program: Program) -> bool:
        seen.append(frozenset(n.name for n in program.operators))
        return {"relu_1", "relu_4"} <= seen[-1]

    found = reduction(blocks_program(), fails, known=True)
    at_operators = [s for s in found.steps if s.stage in ("window", "static sizes")]
    tried = seen[: at_operators[0].tries]
    assert len(tried) == len(set(tried))


def test_what_does_not_fail_cannot_be_reduced() -> None:
    with pytest.raises(UsageError, match="does not fail"):
        reduce_program(blocks_program(), lambda program: False)


def test_every_stage_is_told_and_is_part_of_the_story() -> None:
    told: list[Progress] = []
    found = reduction(blocks_program(), fails_with(Faulty(how="crash")), tell=told.append)
    assert set(found.steps) <= set(told)
    assert [s.stage for s in found.steps][:3] == ["window", "static sizes", "operators"]
    assert found.steps[0].before == len(blocks_program().operators)
    assert found.steps[-1].now == len(found.program.operators)
    assert all(s.now <= s.before for s in found.steps)
    assert found.steps[-1].tries == found.tries


def test_the_program_given_stays_as_it_was() -> None:
    before = text(blocks_program(), values=True)
    reduce_program(blocks_program(), fails_with(SwapActivation(to="gelu")))
    assert text(blocks_program(), values=True) == before


# -- plainer programs -----------------------------------------------------------------------------


def test_extra_samples_are_dropped() -> None:
    program = blocks_program().clone()
    bad = torch.full((5, 8), 100.0)
    program.samples = (*program.samples, (torch.randn(2, 8),), (bad,))

    def fails(candidate: Program) -> bool:
        values = [v for sample in candidate.samples for v in sample]
        return any(bool((v == 100.0).any()) for v in values) and any(
            is_op(n, aten.layer_norm.default) for n in candidate.operators
        )

    found = reduce_program(program, fails)
    assert len(found.samples) == 1
    assert [n.name for n in found.operators] == ["layer_norm"]
    assert torch.equal(found.samples[0][0], bad)


def test_a_static_program_computes_the_same() -> None:
    program = blocks_program()
    static = steps.static(program)
    assert static is not None
    verify(static)
    assert not any("sym_size" in str(n.target) for n in static.operators)
    expected = run(program, program.samples[0])
    for a, b in zip(expected, run(static, static.samples[0]), strict=True):
        assert torch.equal(a, b)


def test_outputs_are_dropped_with_what_only_they_needed() -> None:
    program = steps.static(blocks_program())
    assert program is not None
    first, second = list(steps.fewer_outputs(program))[:2]
    assert len(first.results) == len(second.results) == 1
    verify(first)
    verify(second)
    assert len(second.operators) < len(first.operators) == len(program.operators)


def test_an_input_stays_where_it_is_read_or_alone_tells_a_size() -> None:
    program = blocks_program()
    part = induced(program, {"getitem"}, Recorded(program))
    assert text(part).startswith("program(%x: f32[batch, 8], %reshape: f32[2*batch, 4])")
    assert not part.placeholders[0].users
    assert steps.without_input(part, 0) is None
    assert steps.without_input(part, 1) is None
    static = steps.static(part)
    assert static is not None
    smaller = steps.without_input(static, 0)
    assert smaller is not None
    verify(smaller)
    assert text(smaller).startswith("program(%reshape: f32[6, 4])")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_pattern_values_are_small_and_of_both_signs(dtype: torch.dtype) -> None:
    made = steps.pattern((5, 40), dtype=dtype)
    assert made.dtype == dtype
    assert len(made.unique()) == (17 if dtype.is_floating_point else 2)
    assert float(made.to(torch.float32).abs().max()) == 1.0


# -- bundles --------------------------------------------------------------------------------------


def bundle_of(pass_: Pass, folder: Path, *later: Pass) -> Path:
    """A bundle of the failure of a pass on the blocks."""
    recipe = Recipe(passes=(pass_, *later))
    with pytest.raises(PlanishError):
        run_pipeline(blocks_program(), recipe, None, [Reproduce(folder), *default_instruments()])
    (found,) = folder.iterdir()
    return found


@pytest.mark.parametrize("how", ["crash", "verifier", "numbers"])
def test_a_reduced_bundle_replays_and_its_module_fails_too(how: str, tmp_path: Path) -> None:
    later = SwapActivation(to="relu")
    bundle = load_bundle(bundle_of(Faulty(how=how), tmp_path / "in", later))  # type: ignore[arg-type]
    result = reduce_bundle(bundle, tmp_path / "out")
    assert result.problem is None
    assert result.after == 2
    assert result.removed >= 0.9
    again = load_bundle(tmp_path / "out")
    assert len(again.recipe.passes) == len(again.facts.passes) == 1
    assert len(again.program.operators) == 2
    error = replay(again)
    assert error is not None
    assert failure_of(error).signature == bundle.failure.signature == again.failure.signature
    readme = (tmp_path / "out" / "README.txt").read_text()
    assert "planish repro out" in readme
    assert "module.py" in readme
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_reduced_bundle_can_be_reduced_again_into_its_own_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = reduce_bundle(load_bundle(bundle_of(Faulty(), tmp_path / "in")), out)
    second = reduce_bundle(load_bundle(out), out)
    assert (second.before, second.after) == (first.after, first.after)
    assert load_bundle(out).failure.signature == load_bundle(out).failure.signature
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


class Shifted(nn.Module):
    """An activation that is zero on the calibration data and not on the sample."""

    def forward(self, x: Tensor) -> Tensor:
        return (((x + 1).tanh() * 2).relu() + 3).sigmoid()


def test_a_failure_that_only_calibration_data_shows_is_reduced(tmp_path: Path) -> None:
    program = capture(Shifted().eval(), (torch.ones(4),))
    recipe, context = Recipe(passes=(Calibrated(),)), PassContext()
    instruments = [Reproduce(tmp_path / "in"), *default_instruments()]
    with Spool(program) as spool:
        spool.add((torch.ones(4),), 16)
        spool.add((-3 * torch.ones(4),), 16)
        context.calibration = spool
        with pytest.raises(PlanishError):
            run_pipeline(program, recipe, context, instruments)
    (folder,) = (tmp_path / "in").iterdir()
    result = reduce_bundle(load_bundle(folder), tmp_path / "out")
    assert [n.name for n in result.reduction.program.operators] == ["relu"]
    assert result.problem is None
    assert result.reduction.tries == result.reduction.steps[-1].tries
    again = load_bundle(tmp_path / "out")
    assert again.calibration is not None
    assert failure_of(replay(again) or ValueError()).signature == again.failure.signature


def test_a_bundle_that_does_not_fail_is_not_reduced(tmp_path: Path) -> None:
    folder = bundle_of(SwapActivation(to="gelu"), tmp_path / "in")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("gelu", "relu"))
    with pytest.raises(NotReproducedError, match="nothing fails"):
        reduce_bundle(load_bundle(folder), tmp_path / "out")
    recipe.write_text(Recipe(passes=(Faulty(),)).to_yaml())
    with pytest.raises(NotReproducedError, match="something else fails"):
        reduce_bundle(load_bundle(folder), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    bundle = load_bundle(bundle_of(Faulty(), tmp_path / "in"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no bundle"):
        reduce_bundle(bundle, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_file_holds_what_the_search_found(tmp_path: Path) -> None:
    bundle = load_bundle(bundle_of(SwapActivation(to="gelu"), tmp_path / "in"))
    result = reduce_bundle(bundle, tmp_path / "out")
    saved = load(tmp_path / "out" / "program.pt2")
    assert text(saved, values=True) == text(result.reduction.program, values=True)
