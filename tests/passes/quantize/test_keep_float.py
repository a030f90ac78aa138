"""Which operators stay in floating point, and that they are the fewest that keep the bound."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planish
from planish.ir.capture import capture
from planish.ir.compare import measure
from planish.ir.errors import BoundError, PassError, RecipeError, RequirementError, UsageError
from planish.ir.execute import run
from planish.ir.program import Program
from planish.ir.text import text
from planish.ir.verify import verify
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.pipeline import Run, run_pipeline
from planish.passes.quantize.keep_float import KeepFloat, kept_in_float
from planish.passes.quantize.restore import quantized_operators
from planish.passes.quantize.search import fewest
from planish.passes.quantize.where import NoSuchOperatorError
from planish.passes.recipe import Recipe


class Net(nn.Module):
    """``bad`` loses most bits: huge weights for tiny values beside ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.bad, self.mid = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.norm.weight[0] = 1e-3
            self.bad.weight[:, 0] *= 300

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.relu(self.conv(x)).transpose(1, 2))
        result: Tensor = self.head(y + self.mid(F.gelu(self.bad(y))))
        return result


def _net() -> Program:
    torch.manual_seed(3)
    return capture(Net().eval(), (torch.randn(2, 3, 24),))


def _batches(count: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 24, generator=generator) for _ in range(count)]


def _ran(recipe: str, program: Program | None = None, **context: Any) -> tuple[Run, list[str]]:
    program = program or _net()
    held = spool(_batches(), program)
    calibration, held_out = held.split()
    remarks: list[str] = []
    options = {"calibration": calibration, "held_out": held_out, **context}
    run_ = run_pipeline(
        program, Recipe.parse(recipe), PassContext(remark=remarks.append, **options)
    )
    return run_, remarks


def _restored(run_: Run) -> list[str]:
    return [change.node for change in run_.records[-1].changes]


def test_fires_on_the_operator_that_was_made_bad_and_on_no_other() -> None:
    plain, _ = _ran("quantize")
    run_, remarks = _ran("quantize,keep-float{min_sqnr_db=25}")
    verify(run_.program, since=run_.original)
    assert _restored(run_) == ["linear"]
    before = {n.name for n in quantized_operators(plain.program)}
    assert {n.name for n in quantized_operators(run_.program)} == before - {"linear"}
    shown = text(run_.program)
    assert "= aten.linear(%7, @bad.weight, @bad.bias)" in shown, shown
    assert shown.count("planish.quantize") == text(plain.program).count("planish.quantize") - 1
    assert "1 of" in remarks[-1]


def test_the_bound_holds_on_data_that_nothing_else_saw() -> None:
    run_, _ = _ran("quantize,keep-float{min_sqnr_db=25,min_cosine=0.995}")
    for x in _batches(40)[10:]:
        found = measure(run(run_.original, (x,)), run(run_.program, (x,)))
        assert found.sqnr_db > 24  # the bound, but for the luck of the draw
        assert found.cosine > 0.994


def test_restored_operators_compute_what_they_did() -> None:
    """With everything restored, the program is the one before quantizing, to the last bit."""
    run_, _ = _ran("quantize,keep-float{operators=[*]}")
    assert not quantized_operators(run_.program)
    assert text(run_.program) == text(run_.original)
    for x in _batches(3):
        assert measure(run(run_.original, (x,)), run(run_.program, (x,))).equal


def test_more_operators_stay_as_the_bound_rises() -> None:
    counts = [
        len(_restored(_ran(f"quantize,keep-float{{min_sqnr_db={bound}}}")[0]))
        for bound in (0, 25, 36, 45)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[1] < counts[-1]


def test_every_operator_is_reported_with_its_number() -> None:
    run_, _ = _ran("quantize,keep-float{min_sqnr_db=25}")
    errors = run_.records[-1].operators
    plain, _ = _ran("quantize")
    assert {e.node for e in errors} == {n.name for n in quantized_operators(plain.program)}
    assert [e.node for e in errors if e.kept_float] == ["linear"]
    worst = errors[0]
    assert worst.node == "linear"
    assert worst.operator == "linear"
    assert worst.source is not None
    assert "self.bad" in worst.source
    assert worst.to_dict()["output_db"] == worst.output_db < 25


def test_what_cannot_be_reached_is_an_error_with_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_REPRO_DIR", str(tmp_path))
    with pytest.raises(BoundError, match=r"\(min_sqnr_db 60\) cannot be kept with at most 1") as e:
        planish.optimize(
            _net(),
            recipe="quantize,keep-float{min_sqnr_db=60,max_operators=1}",
            calibration=_batches(),
        )
    found = re.search(
        r"best reached is ([\d.]+) dB.* with 1 of (\d+) .*: ([\d.]+) dB", e.value.what
    )
    assert found is not None
    assert 60 > float(found[1]) > float(found[3])
    assert e.value.exit_code == 3
    assert e.value.replay is None
    assert not list(tmp_path.iterdir())  # an answer, and no failure of a pass


def test_a_bound_that_leaves_nothing_in_integers_is_an_error() -> None:
    """Everything in floating point keeps any bound, and is not what quantizing was asked for."""
    with pytest.raises(BoundError, match=r"\(min_sqnr_db 500\) cannot be kept with anything in"):
        _ran("quantize,keep-float{min_sqnr_db=500}")
    with pytest.raises(BoundError, match=r"\(min_cosine 1\) cannot be kept with anything in"):
        _ran("quantize,keep-float{operators=[linear],min_cosine=1}")


def test_a_bound_that_holds_anyway_restores_nothing() -> None:
    run_, remarks = _ran("quantize,keep-float{min_sqnr_db=1}")
    assert not run_.records[-1].changed
    assert "0 of" in remarks[-1]


def test_named_operators_need_no_calibration() -> None:
    quantized = "quantize{mode=dynamic},keep-float{operators=[linear]}"
    run_, _ = _ran(quantized, calibration=None, held_out=None)
    assert _restored(run_) == ["linear"]
    run_, _ = _ran("quantize,keep-float{operators=[bad,aten.conv1d]}")
    assert _restored(run_) == ["conv1d", "linear"]


def test_named_operators_count_in_a_bound() -> None:
    run_, remarks = _ran("quantize,keep-float{operators=[conv1d],min_sqnr_db=25}")
    assert _restored(run_) == ["conv1d", "linear"]
    assert "2 of" in remarks[-1]


def test_four_bit_weights_come_back_whole() -> None:
    run_, _ = _ran(
        "quantize{mode=weight,weights=int4,granularity=block,block_size=16},"
        "keep-float{operators=[*]}"
    )
    assert text(run_.program) == text(run_.original)


@pytest.mark.parametrize("better", [True, False])
def test_the_users_metric_decides(better: bool) -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def metric(outputs: Tensor, reference: Tensor) -> float:
        calls.append((outputs, reference))
        return 1.0 - float((outputs - reference).norm() / reference.norm()) if better else 0.5

    recipe = "quantize,keep-float{min_metric=0.95}"
    if not better:
        with pytest.raises(BoundError, match=r"the best reached is .*, metric 0.5 on 2 batches"):
            _ran(recipe, metric=metric)
        return
    run_, remarks = _ran(recipe, metric=metric)
    outputs, reference = calls[0]
    assert outputs.shape == reference.shape == (2, 24, 5)
    assert _restored(run_) == ["linear"]
    assert "metric 0.9" in remarks[-1]


def test_refusals() -> None:
    with pytest.raises(PassError, match="no bound to keep"):
        _ran("quantize,keep-float")
    with pytest.raises(RequirementError, match="requires calibrated"):
        _ran("quantize{mode=dynamic},keep-float{min_sqnr_db=9}", calibration=None)
    with pytest.raises(RequirementError, match="min_metric needs a metric"):
        _ran("quantize,keep-float{min_metric=0.9}")
    with pytest.raises(
        NoSuchOperatorError, match="'lineer', which no quantized operator"
    ) as caught:
        _ran("quantize,keep-float{operators=[lineer]}")
    assert "linear" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="0 batches measure nothing"):
        Recipe.parse("keep-float{batches=0}")
    quantized, _ = _ran("quantize")
    with pytest.raises(PassError, match="came to it quantized"):
        _ran("keep-float{min_sqnr_db=9}", quantized.program)


def test_nothing_quantized_is_a_remark() -> None:
    _, remarks = _ran("keep-float{min_sqnr_db=9}")
    assert "nothing is quantized" in remarks[0]


def test_without_held_out_batches_a_remark_says_so() -> None:
    _, remarks = _ran("quantize,keep-float{min_sqnr_db=1}", held_out=None)
    assert any("no calibration batch is held out" in remark for remark in remarks)


def test_a_failing_metric_is_the_callers_error() -> None:
    def metric(outputs: Tensor, reference: Tensor) -> float:
        raise ZeroDivisionError("no samples")

    with pytest.raises(Exception, match="the metric failed: ZeroDivisionError: no samples"):
        _ran("quantize,keep-float{min_metric=0.9}", metric=metric)
    with pytest.raises(Exception, match="the metric returned nan"):
        _ran("quantize,keep-float{min_metric=0.9}", metric=lambda a, b: float("nan"))


def test_options_round_trip() -> None:
    written = "keep-float{min_cosine=0.99,max_operators=3,operators=[a,b.*],padding_mask=mask}"
    recipe = Recipe.parse(written)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert isinstance(recipe.passes[0], KeepFloat)
    assert recipe.passes[0].operators == ("a", "b.*")


def test_running_twice_restores_nothing_more() -> None:
    step = "keep-float{min_sqnr_db=25}"
    run_, _ = _ran(f"quantize,{step},{step}")
    assert run_.records[1].changed
    assert not run_.records[2].changed


@pytest.mark.parametrize("needed", [(), ("d",), ("a", "b"), ("b", "e"), tuple("abcde")])
def test_fewest_finds_the_fewest(needed: tuple[str, ...]) -> None:
    tried = []

    def good(kept: Sequence[str]) -> bool:
        tried.append(tuple(kept))
        return set(needed) <= set(kept)

    assert fewest("abcde", good) == needed
    assert len(tried) <= 2 + 3 + 5


def test_fewest_of_what_cannot_be() -> None:
    assert fewest("abc", lambda kept: False) is None


def test_trials_leave_the_program_alone() -> None:
    run_, _ = _ran("quantize")
    shown = text(run_.program, values=True)
    trial = kept_in_float(run_.program, run_.original, ["linear"])
    assert text(run_.program, values=True) == shown
    assert len(quantized_operators(trial)) == len(quantized_operators(run_.program)) - 1


def test_a_metric_may_read_labels() -> None:
    """It gets the program itself, which runs on whatever the labeled batches hold."""
    labeled = [(x, run(_net(), (x,))[0].argmax(-1)) for x in _batches(4)]
    seen: list[object] = []

    def agreement(model: Any, batches: Any) -> float:
        seen.append(batches)
        right = [model(x).argmax(-1) == label for x, label in batches]
        return float(torch.stack(right).float().mean())

    recipe = "quantize{weights=int4},keep-float{min_metric=0.99}"
    run_, remarks = _ran(recipe, metric=agreement, labeled=labeled)
    assert all(batches is labeled for batches in seen)
    assert _restored(run_)
    assert agreement(run_.program, labeled) >= 0.99
    assert ", metric 0.99" in remarks[-1] or ", metric 1 " in remarks[-1]
    with pytest.raises(Exception, match=r"it is called as metric\(model, labeled\)"):
        _ran(recipe, metric=lambda model, batches: 1 / 0, labeled=labeled)
    with pytest.raises(UsageError, match="can be read only once"):
        planish.optimize(
            _net(), recipe=recipe, calibration=_batches(), metric=agreement, labeled=iter(labeled)
        )
