"""The quantization table: how files are made, judged and held to what is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.export import Dim

from planish.ir.errors import UsageError
from planish.tools.bench.quantization import judges, table
from planish.tools.bench.quantization.__main__ import main
from planish.tools.bench.quantization.cases import CASES, Case
from planish.tools.bench.quantization.rivals import Worker
from planish.tools.bench.real_inputs import ctc_text


class Net(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


def batches(seed: int, count: int) -> list[tuple[Tensor, ...]]:
    made = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 16, generator=made),) for _ in range(count)]


CASE = Case(
    name="net",
    load=lambda: Net().eval(),
    timed=lambda: (batches(3, 1)[0][0][:1],),
    calibration=lambda: batches(1, 8),
    held=lambda: batches(2, 8),
    judge=judges.classes,
    dynamic_shapes=({0: Dim("batch", max=64)},),
    recipe="int8-static",
    dynamic=True,
    speed=1e-6,
    goals={"sqnr_db": 20.0},
)


def test_one_row_for_each_file_the_plain_one_first(tmp_path: Path) -> None:
    rows = {row.name: row for row in table.measure(CASE, rounds=3, keep=tmp_path)}
    assert list(rows) == [
        table.BASE, table.OURS, "ORT quantize_static", "ORT quantize_dynamic"
    ]  # fmt: skip
    assert rows[table.BASE].ratio == 1.0
    assert rows[table.BASE].scores == {"sqnr_db": 200.0, "same_top1": 1.0}
    ours = rows[table.OURS]
    assert 20 < ours.scores["sqnr_db"] < 80
    assert "2 of 2 quantized operators in integer kernels" in ours.note
    assert (tmp_path / "planish.onnx").exists()
    found = table.verdicts(CASE, list(rows.values()))
    assert [good for _, good in found] == [True, True]


def test_a_tool_that_fails_has_a_row_that_says_why() -> None:
    rows = {
        row.name: row
        for row in table.measure(CASE, rounds=3, recipe="quantize{where={include=[x]}}")
    }
    ours = rows[table.OURS]
    assert ours.ratio is None
    assert "where.include" in ours.note
    assert rows["ORT quantize_static"].scores
    ((sentence, good),) = table.verdicts(CASE, list(rows.values()))
    assert not good
    assert "where.include" in sentence


def test_what_is_asked_is_compared_with_what_was_measured() -> None:
    row = table.Row(table.OURS, ratio=0.5, scores={"sqnr_db": 19.0})
    case = Case(**{**vars(CASE), "speed": 1.0})
    assert [good for _, good in table.verdicts(case, [row])] == [False, False]
    portable = table.Row(table.PORTABLE, ratio=2.0)
    rival = table.Row("NNCF int8, OpenVINO", ratio=2.2)
    assert [g for _, g in table.verdicts(case, [row, portable, rival])] == [False, False, False]
    rival.ratio = 2.1
    assert table.verdicts(case, [row, portable, rival])[-1][1]


def test_an_environment_without_rivals_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"openvino|nncf"):
        Worker(Path(sys.executable))
    with pytest.raises(UsageError, match="cannot be started"):
        Worker(Path("/nowhere/python"))


def test_words_and_classes_are_counted() -> None:
    logits = torch.eye(97)[torch.tensor([[15, 0, 16, 16]])]  # of CRNN symbols
    truth = [ctc_text(logits)[0]]
    scores = judges.words(truth, [logits], [logits])
    assert scores == {"word_accuracy": 1.0, "word_loss": 0.0, "sqnr_db": 200.0}
    wrong = torch.eye(97)[torch.tensor([[15, 0, 17, 17]])]
    assert judges.words(truth, [logits], [wrong])["word_loss"] == -1.0
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.9, 0.0], [0.2, 0.1]])
    assert judges.classes([], [one], [other])["same_top1"] == 0.5


def test_every_model_has_data_of_its_own_for_judging() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.goals
        assert case.speed > 1


def test_the_command_lists_its_models() -> None:
    found = CliRunner().invoke(main, ["--list"])
    assert found.exit_code == 0
    assert found.output.split("\n")[0] == CASES[0].name
    assert CliRunner().invoke(main, ["--only", "no such model"]).exit_code == 2
