"""What a bundle of a quantizing recipe lacks, it says."""

from pathlib import Path

import pytest

import planish
from planish.ir.errors import PlanishError
from planish.passes.debug.bundle import load_bundle
from tests.passes.debug.bundling import bundle_in, deep, sample
from tests.support import failing_passes as failing


def test_what_a_bundle_behind_quantize_lacks_is_said(tmp_path: Path) -> None:
    program = deep(width=4)
    steps = [*planish.Recipe.parse("quantize").passes, failing.Crash()]
    with pytest.raises(PlanishError, match="crash"):
        planish.optimize(
            program, recipe=steps, calibration=[sample()] * 5, metric=lambda a, b: 1.0,
            dump_dir=tmp_path,
        )  # fmt: skip
    said = " ".join(load_bundle(bundle_in(tmp_path)).facts.left_out)
    assert "the metric, which no file can hold" in said
    assert "from before it was quantized" in said
