"""The ablation table: what it compares, and what a repair that cannot run looks like in it."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from planish.passes.recipe import Recipe
from planish.tools.bench.quantization.ablation import ABLATIONS, PLAIN, Row, ablate, main
from planish.tools.bench.quantization.cases import CASES, Case


def _case() -> Case:
    def load() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

    def batches(seed: int) -> list[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(5, 8, generator=generator),) for _ in range(4)]

    return Case(
        name="tiny",
        load=load,
        timed=lambda: batches(0)[0],
        calibration=lambda: batches(1),
        held=lambda: batches(2),
    )


def test_each_row_is_compared_with_the_one_it_builds_on() -> None:
    told: list[Row] = []
    rows = ablate(
        _case(),
        [
            ("quantize,correct-bias", PLAIN),
            ("quantize{weights=int4}", PLAIN),
            ("quantize{weights=int4},correct-bias", "quantize{weights=int4}"),
        ],
        calibration=2,
        tell=told.append,
    )
    assert [row.recipe for row in rows][:2] == [PLAIN, "quantize,correct-bias"]
    assert told[-1] == rows[-1]
    decibels = [row.scores["sqnr_db"] for row in rows]
    assert rows[0].gain_db is None
    assert rows[2].gain_db == pytest.approx(decibels[2] - decibels[0])
    assert decibels[2] < decibels[0] - 1
    assert rows[3].gain_db == pytest.approx(decibels[3] - decibels[2])
    assert rows[1].note == "quantize 2, correct-bias 2"


def test_a_repair_that_cannot_run_says_why_in_its_row() -> None:
    plain, broken = ablate(_case(), [("correct-bias", PLAIN)], held=1)
    assert plain.scores
    assert broken.scores == {}
    assert "nothing is quantized" in broken.note


def test_the_table_names_models_that_exist_and_recipes_that_parse() -> None:
    assert set(ABLATIONS) <= {case.name for case in CASES}
    for rows in ABLATIONS.values():
        known = {PLAIN}
        for recipe, against in rows:
            Recipe.parse(recipe)
            assert against in known
            known.add(recipe)


def test_an_unknown_model_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["--only", "nonesuch"])
    assert result.exit_code == 2
    assert "minilm" in result.output
