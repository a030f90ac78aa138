"""A quantized file is held to its program one operator at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from planish.backends import onnx_translate, stepwise, verify_artifact
from planish.backends.base import Artifact, ExportOptions, Stepwise
from planish.backends.onnx_graph import Emitter
from planish.backends.registry import load_backend
from planish.ir.compare import measure
from planish.ir.errors import ExportError
from planish.ir.ops import aten
from planish.ir.program import Program
from tests.support.planted import Net, planted


def net(**options: Any) -> Program:
    shapes = ({0: Dim("batch", max=16)},)
    torch.manual_seed(1)
    return planted(Net(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes, **options)


def export(program: Program, folder: Path, target: str = "onnx", **options: Any) -> Artifact:
    return load_backend(target).export(program, folder / "m.onnx", ExportOptions(**options))


def steps_of(artifact: Artifact) -> Stepwise:
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    return artifact.comparison.stepwise


@pytest.mark.parametrize("target", ["onnx", "onnxruntime-cpu"])
@pytest.mark.parametrize("options", [{}, {"last": True}, {"dynamic": True}], ids=str)
def test_every_operator_agrees_within_a_step(
    options: dict[str, bool], target: str, tmp_path: Path
) -> None:
    artifact = export(net(**options), tmp_path, target)
    found = steps_of(artifact)
    assert found.probes == ("sample 0", "batch=3")
    assert found.values >= 9
    assert found.max_steps <= 1
    assert found.max_relative < 1e-5
    assert found.unchecked == ()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # the copies are gone


def test_a_float_program_is_compared_as_a_whole(tmp_path: Path) -> None:
    program = planted(nn.ReLU(), (torch.randn(2, 3),))
    artifact = export(program, tmp_path)
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is None


Change = Callable[[Emitter, Any], Any]


def changed(monkeypatch: pytest.MonkeyPatch, operator: Any, change: Change) -> None:
    """Let a translation do something to what it emits for an operator."""
    right = onnx_translate.TABLE[operator]

    def wrong(e: Emitter, node: Any) -> Any:
        view = right(e, node)
        return view.with_base(change(e, view.base))

    monkeypatch.setitem(onnx_translate.TABLE, operator, wrong)


def plus_codes(steps: int) -> Change:
    """Move codes up, without running over."""

    def change(e: Emitter, base: Any) -> Any:
        wide = e.op("Cast", base, to=6)  # int32
        moved = e.op("Add", wide, e.constant(steps, torch.int32))
        top = e.constant(255, torch.int32)
        return e.op("Cast", e.op("Min", moved, top), to=2)  # uint8

    return change


def test_codes_may_be_one_step_off_and_not_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = torch.ops.planish.quantize.default
    with monkeypatch.context() as patch:
        changed(patch, quantize, plus_codes(1))
        artifact = export(net(), tmp_path)
        assert steps_of(artifact).max_steps == 1
    changed(monkeypatch, quantize, plus_codes(2))
    with pytest.raises(ExportError, match="differs by 2 steps") as caught:
        export(net(), tmp_path)
    assert "quantize_default" in str(caught.value)
    assert "planish.quantize.default" in str(caught.value)


def test_a_real_number_that_is_off_names_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(
        monkeypatch, aten.relu.default, lambda e, v: e.op("Mul", v, e.constant(1.01, torch.float32))
    )
    with pytest.raises(ExportError, match=r"relu = aten\.relu\.default") as caught:
        export(net(), tmp_path)
    assert "self.conv(x)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_error_is_of_one_operator_and_not_of_those_before_it(tmp_path: Path) -> None:
    """Fed with the file's own values, nothing adds up: 20 quantized layers stay within a step."""
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(12, 12), nn.Tanh())]
    program = planted(nn.Sequential(*layers), (torch.randn(64, 12),))
    artifact = export(program, tmp_path, "onnxruntime-cpu")
    assert steps_of(artifact).max_steps <= 1
    assert steps_of(artifact).max_relative < 1e-5


def test_values_that_do_not_fit_together_come_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    kept = stepwise._Copies.run

    def counted(self: Any, seen: Any, inputs: Any) -> Any:
        runs.append(len(seen))
        return kept(self, seen, inputs)

    monkeypatch.setattr(stepwise._Copies, "run", counted)
    whole = steps_of(export(net(), tmp_path))
    one_run = list(runs)
    monkeypatch.setattr(stepwise, "GROUP_BYTES", 4096)
    runs.clear()
    parts = steps_of(export(net(), tmp_path))
    assert whole == parts
    assert len(one_run) == 2  # one for each probe
    assert len(runs) > 2 * len(one_run)
    assert sum(runs) == sum(one_run)


class Dynamic(nn.Module):
    """One linear whose input the kernel itself may quantize."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def hiding(flipped: int) -> Change:
    """A linear that quantizes inside, and rounds some codes of every row the other way."""

    def translate(e: Emitter, node: Any) -> Any:
        codes = node.args[0].args[0]  # of the dequantize: a part of the dynamic quantize
        x = e.value(codes.args[0].args[0])
        made, scale, zero = e.ops(3, "DynamicQuantizeLinear", x)
        wide = e.op("Cast", made, to=6)
        bump = torch.zeros(32, dtype=torch.int32)
        bump[:flipped] = 1
        moved = e.op("Add", wide, e.tensor(bump, "bump"))
        back = e.op("Cast", e.op("Min", moved, e.constant(255, torch.int32)), to=2)
        real = e.op("DequantizeLinear", back, scale, zero)
        weight = e.op("Transpose", e.value(node.args[1]), perm=[1, 0])
        return e.op("Add", e.op("MatMul", real, weight), e.value(node.args[2]))

    return translate


def test_codes_inside_of_a_kernel_may_round_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = planted(Dynamic(), (torch.randn(4, 32),), dynamic=True)
    linear = aten.linear.default
    monkeypatch.setitem(onnx_translate.TABLE, linear, hiding(flipped=1))
    export(program, tmp_path)
    monkeypatch.setitem(onnx_translate.TABLE, linear, hiding(flipped=24))
    with pytest.raises(ExportError, match=r"linear = aten\.linear\.default"):
        export(program, tmp_path)


def test_outputs_may_not_drift_further_than_quantizing_moved_them() -> None:
    """The whole outputs are judged beside what quantizing did, and reported in any case."""
    expected = [torch.randn(1000, generator=torch.Generator().manual_seed(0))]
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(1))

    def at(decibels: float) -> list[Tensor]:
        return [expected[0] + 10 ** (-decibels / 20) * noise]

    drift = verify_artifact.drift
    assert drift(expected, at(20), measure(expected, at(25))) is None  # 6 dB are left for roundings
    assert "quantizing itself left" in str(drift(expected, at(20), measure(expected, at(28))))
    assert drift(expected, at(20), None) is None
    assert "at least 6 dB" in str(drift(expected, at(3), None))
    exact = measure(expected, expected)
    assert drift(expected, at(40), exact) is None  # fine in any case
    assert drift(expected, at(20), exact) is not None
    assert drift(expected, [expected[0][:10]], None) is not None


def test_an_index_may_change_with_a_rounding() -> None:
    assert verify_artifact.drift([torch.tensor([3])], [torch.tensor([4])], None) is None
