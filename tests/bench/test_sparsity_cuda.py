"""The measurement of sparse tensor cores: it says where it cannot, and measures where it can."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import planish
from planish.sparse_cuda import LEAST_CAPABILITY, choose
from planish.tools.bench.sparsity.cuda import RECIPE, FeedForward, main

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST_CAPABILITY


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(main, ["--json"])
    assert result.exit_code == 4
    assert "torch sees no CUDA GPU" in result.stderr
    assert not result.stdout


def test_both_linears_of_the_net_can_be_packed() -> None:
    x = torch.randn(8, 64)
    result = planish.optimize(
        FeedForward(64).eval(), x, recipe=RECIPE, calibration=[x], verify="off"
    )
    choice = choose(result.program)
    assert set(choice.sparse) == {"up.weight", "down.weight"}
    assert not choice.dense


@pytest.mark.skipif(not GPU, reason="needs a GPU with sparse tensor cores")
def test_it_measures_where_it_can() -> None:
    options = ["--json", "--widths", "256", "--tokens", "64", "--rounds", "1"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)["rows"]
    assert row["error"] < 5e-3
    assert row["sparse_mb"] < row["dense_mb"]
