"""The choice among recipes: decided by times, which the tests make up, so that they are facts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import planish
from planish import fastest
from planish.backends import ort_race
from planish.backends.ort_race import Speed
from planish.ir.errors import BoundError, NothingToDoError, RecipeError, RequirementError
from planish.ir.text import text
from planish.optimized import Optimized

Cost = Callable[[onnx.NodeProto, bool], float]  # of a node; whether it reads integers


class Net(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)).mean((2, 3))
        result: Tensor = self.head(torch.tanh(self.up(y)))
        return result


def _calibration(count: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def _optimized(recipe: str = "int8", module: nn.Module | None = None, **options: Any) -> Optimized:
    torch.manual_seed(0)
    given = {"calibration": _calibration(), "target": "onnx", **options}
    return planish.optimize(
        (module or Net()).eval(), (torch.randn(2, 3, 8, 8),), recipe=recipe, **given
    )


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], list[list[Path]]]:
    """Let files take as long as their operators cost; returns the races that were run."""

    def install(cost: Cost) -> list[list[Path]]:
        races: list[list[Path]] = []

        def race(paths: Sequence[Path], inputs: Sequence[Any], **options: Any) -> list[Speed]:
            races.append(list(paths))
            times = [_cost(path, cost) for path in paths]
            return [
                Speed(
                    best_ms=t, median_ms=t, ratio=times[0] / t, median_ratio=times[0] / t, rounds=1
                )
                for t in times
            ]

        monkeypatch.setattr(ort_race, "race", race)
        return races

    return install


def _cost(path: Path, cost: Cost) -> float:
    graph = onnx.load(path).graph
    integers = {
        output
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        for output in node.output
    }
    return 1.0 + sum(cost(node, any(i in integers for i in node.input)) for node in graph.node)


def _products(node: onnx.NodeProto) -> bool:
    return node.op_type in ("MatMul", "Gemm", "Conv")


def integers_pay(node: onnx.NodeProto, integer: bool) -> float:
    """Integers are ten times as fast, ranges at run time cost something."""
    if node.op_type == "DynamicQuantizeLinear":
        return 10.0
    return (10.0 if integer else 100.0) if _products(node) else 0.0


def integers_lose(node: onnx.NodeProto, integer: bool) -> float:
    """Integers are slower everywhere."""
    return (200.0 if integer else 100.0) if _products(node) else 0.0


def convolutions_lose(node: onnx.NodeProto, integer: bool) -> float:
    """Integers are slower in convolutions, and only there."""
    if node.op_type == "DynamicQuantizeLinear":
        return 300.0
    if node.op_type == "Conv":
        return 300.0 if integer else 100.0
    return (10.0 if integer else 100.0) if _products(node) else 0.0


def _operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def _races(result: Optimized) -> dict[str, Any]:
    return {e["name"]: e for e in result.report.to_dict()["race"]["entrants"]}


def test_the_fastest_is_taken(costs: Callable[[Cost], list[list[Path]]], tmp_path: Path) -> None:
    races = costs(integers_pay)
    result = _optimized()
    entrants = _races(result)
    assert [len(paths) for paths in races] == [3]
    assert list(entrants) == ["float", "int8-static", "int8-dynamic"]
    assert entrants["int8-static"]["verdict"] == "taken"
    assert entrants["int8-dynamic"]["verdict"] == "slower than int8-static"
    assert entrants["int8-static"]["fidelity"]["sqnr_db"] > 20
    assert entrants["float"]["speed"]["ratio"] == 1.0
    result.export(tmp_path / "model.onnx")
    assert "QuantizeLinear" in _operators(tmp_path / "model.onnx")
    assert "int8-static" in str(result.report)


def test_what_was_chosen_is_a_plain_recipe_that_measures_nothing(
    costs: Callable[[Cost], list[list[Path]]],
) -> None:
    races = costs(convolutions_lose)
    result = _optimized()
    assert races
    assert result.recipe.alternatives == {}
    races.clear()
    again = _optimized(str(result.recipe))
    assert not races
    assert text(again.program, values=True) == text(result.program, values=True)
    assert again.report.race is None


def test_a_region_that_loses_goes_back_to_float(
    costs: Callable[[Cost], list[list[Path]]], tmp_path: Path
) -> None:
    costs(convolutions_lose)
    result = _optimized()
    entrants = _races(result)
    mixed = entrants["int8-static, mixed"]
    assert mixed["verdict"] == "taken"
    assert mixed["kept_float"][0].startswith("conv2d")
    assert not any(name.startswith("linear") for name in mixed["kept_float"])
    assert mixed["speed"]["ratio"] > entrants["int8-static"]["speed"]["ratio"]
    assert str(result.recipe).endswith(f"keep-float{{operators=[{','.join(mixed['kept_float'])}]}}")
    assert any("went back to floating point" in remark for remark in result.report.remarks)
    result.export(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    (conv,) = [node for node in graph.node if node.op_type == "Conv"]
    assert conv.input[0] == graph.input[0].name


def test_never_slower_than_float(costs: Callable[[Cost], list[list[Path]]], tmp_path: Path) -> None:
    costs(integers_lose)
    result = _optimized()
    assert result.report.race is not None
    assert result.report.race.taken == "float"
    assert {e["verdict"] for e in _races(result).values()} == {"taken", "slower than float"}
    (said,) = [r for r in result.report.remarks if r.startswith("NOTHING IS QUANTIZED")]
    assert "int8-static: slower than float (0." in said
    assert said in str(result.report).replace("\n", " ")
    assert result.report.held_out is None  # nothing was lossy
    result.export(tmp_path / "model.onnx")
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(_operators(tmp_path / "model.onnx"))
    exact = _optimized("exact", calibration=None)
    assert text(result.program) == text(exact.program)
    assert str(result.recipe) == str(exact.recipe)


def test_what_keeps_no_bound_is_out(costs: Callable[[Cost], list[list[Path]]]) -> None:
    costs(integers_pay)
    floor = "keep-float{min_sqnr_db=90,max_operators=0}"
    result = _optimized(
        f'alternatives={{int8-static="int8-static,{floor}",int8-dynamic=int8-dynamic}},exact'
    )
    entrants = _races(result)
    said = entrants["int8-static"]["verdict"]
    assert "the bound (min_sqnr_db 90) cannot be kept with at most 0 operators" in said
    assert entrants["int8-static"]["speed"] is None
    assert entrants["int8-dynamic"]["verdict"] == "taken"
    assert any("int8-static is out of the race" in r for r in result.report.remarks)


def test_a_bound_that_a_later_pass_breaks_is_out(
    costs: Callable[[Cost], list[list[Path]]],
) -> None:
    costs(integers_pay)
    later = "quantize{mode=weight,weights=int4,where={include=[aten.linear]}}"
    first = "quantize{where={include=[aten.conv2d]}},keep-float{min_sqnr_db=35}"
    result = _optimized(f'alternatives={{worse="{first},{later}",int8-dynamic=int8-dynamic}},exact')
    entrants = _races(result)
    assert entrants["worse"]["verdict"].startswith("its outputs keep only")
    assert "asked for: min_sqnr_db 35" in entrants["worse"]["verdict"]
    assert entrants["int8-dynamic"]["verdict"] == "taken"


def test_a_bound_that_no_alternative_keeps_is_an_error() -> None:
    floor = "keep-float{min_sqnr_db=500}"
    with pytest.raises(BoundError, match="no alternative keeps the bound: int8-static: ") as caught:
        _optimized(
            f'alternatives={{int8-static="int8-static,{floor}",'
            f'int8-dynamic="int8-dynamic,{floor}"}},exact'
        )
    assert caught.value.exit_code == 3
    assert str(caught.value).count("the best reached is ") == 2
    assert "ask for no more" in str(caught.value.hint)


def test_the_floor_of_int8_itself_leaves_a_float_file(
    costs: Callable[[Cost], list[list[Path]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for a bound, so nobody is told off: the file is in floating point, and said."""
    costs(integers_pay)
    monkeypatch.setattr(fastest, "FLOOR", "keep-float{min_sqnr_db=500}")
    floor = "keep-float{min_sqnr_db=500}"
    result = _optimized(f'alternatives={{int8-dynamic="int8-dynamic,{floor}"}},exact')
    assert result.report.race is not None
    assert result.report.race.taken == "float"
    assert any(r.startswith("NOTHING IS QUANTIZED") for r in result.report.remarks)


def test_nothing_to_quantize_is_an_error_and_no_float_file() -> None:
    with pytest.raises(NothingToDoError, match="no alternative quantizes anything") as caught:
        _optimized(module=nn.Sequential(nn.ReLU(), nn.Flatten()))
    assert caught.value.exit_code == 4


def test_one_that_fails_is_out_and_says_why(costs: Callable[[Cost], list[list[Path]]]) -> None:
    costs(integers_pay)
    result = _optimized(module=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    entrants = _races(result)
    assert entrants["int8-dynamic"]["verdict"].startswith("failed: pass quantize: nothing was")
    assert entrants["int8-static"]["verdict"] == "taken"
    assert any("int8-dynamic is out of the race" in r for r in result.report.remarks)


def test_of_two_about_as_fast_the_more_exact_is_taken(
    costs: Callable[[Cost], list[list[Path]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    costs(lambda node, integer: (10.0 if integer else 100.0) if _products(node) else 0.0)
    fair = ort_race.race

    def tilted(paths: Sequence[Path], inputs: Sequence[Any], **options: Any) -> list[Speed]:
        first, second, third = fair(paths, inputs, **options)
        return [first, replace(second, ratio=1.05 * second.ratio), third]

    monkeypatch.setattr(ort_race, "race", tilted)
    linear = "where={include=[aten.linear]}"
    result = _optimized(
        f'alternatives={{seven="quantize{{range=minmax,{linear},saturation=reduced}}",'
        f'eight="quantize{{range=minmax,{linear}}}"}},none'
    )
    first, second = result.report.race.entrants[1:]  # type: ignore[union-attr]  # there was a race
    assert first.score is not None
    assert second.score is not None
    assert second.score.fidelity.sqnr_db > first.score.fidelity.sqnr_db
    assert second.verdict == "taken"
    assert first.verdict == "little faster than eight, and less exact"


def test_more_exact_but_slower_than_float_beats_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(paths: Sequence[Path], inputs: Sequence[Any], **options: Any) -> list[Speed]:
        ratios = [1.0, 1.1, 0.95] if len(paths) == 3 else [1.0] * len(paths)
        return [
            Speed(best_ms=1 / r, median_ms=1 / r, ratio=r, median_ratio=r, rounds=1) for r in ratios
        ]

    monkeypatch.setattr(ort_race, "race", race)
    linear = "where={include=[aten.linear]}"
    result = _optimized(
        f'alternatives={{seven="quantize{{range=minmax,{linear},saturation=reduced}}",'
        f'eight="quantize{{range=minmax,{linear}}}"}},none'
    )
    assert result.report.race is not None
    assert result.report.race.taken == "seven"
    assert result.report.race.entrants[2].verdict == "slower than float"


def test_missing_calibration_is_an_error_and_no_verdict() -> None:
    with pytest.raises(RequirementError, match="requires calibrated"):
        _optimized(calibration=None)


def test_alternatives_of_alternatives() -> None:
    with pytest.raises(RecipeError, match="has alternatives itself"):
        _optimized("alternatives={a=int8},exact")
    with pytest.raises(RecipeError, match="did you mean"):
        _optimized("alternatives={a=int8-statik},exact")


def test_each_entrant_has_its_own_dump(
    costs: Callable[[Cost], list[list[Path]]], tmp_path: Path
) -> None:
    costs(integers_pay)
    _optimized(dump_dir=tmp_path / "dump")
    assert {p.name for p in (tmp_path / "dump").iterdir()} == {
        "float",
        "int8-static",
        "int8-dynamic",
    }


def test_speeds_of_real_files(tmp_path: Path) -> None:
    """The stopwatch itself: every file runs in every round, the first is its own measure."""
    result = _optimized("exact", calibration=None)
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        result.export(path)
    speeds = ort_race.race(paths, result.program.samples[0], seconds=0.01)
    assert speeds[0].ratio == speeds[0].median_ratio == 1.0
    assert [s.rounds for s in speeds] == [speeds[0].rounds] * 2
    assert speeds[0].rounds >= 8
    assert all(0 < s.best_ms <= s.median_ms for s in speeds)
