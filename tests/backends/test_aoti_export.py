"""Packages of machine code: compiled here, run without planish, refused where they must be."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import planish
from planish.backends.aoti_run import CompiledSession
from planish.ir.errors import ExportError, UnsupportedError, UsageError
from planish.tools.candidates import open_candidate
from tests.support.script_files import Call, answers_of, module

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.conv(x))
        return {"logits": self.head(y.mean((2, 3))), "mean": y.mean()}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[planish.Optimized, Path]:
    """An int8 net of pictures with a dynamic batch."""
    torch.manual_seed(0)
    samples = [(torch.randn(2, 3, 12, 12),) for _ in range(3)]
    result = planish.optimize(
        Net().eval(),
        samples[0],
        recipe="int8-static",
        calibration=samples,
        dynamic_shapes=({0: Dim("batch", max=8)},),
        target="aotinductor",
    )
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    artifact = result.export(path)
    assert artifact.operators["qconv_pointwise_tensor"] == 1
    assert artifact.operators["int_mm"] == 1
    assert artifact.comparison is not None
    assert len(artifact.comparison.probes) == 2
    assert [p.name for p in path.parent.iterdir()] == ["model.pt2"]
    return result, path


@needs_compiler
def test_runs_where_planish_is_not(package: tuple[planish.Optimized, Path]) -> None:
    result, path = package
    calls: list[Call] = [((torch.randn(n, 3, 12, 12),), {}) for n in (2, 5)]
    for (args, _), found in zip(calls, answers_of(path, calls, "aotinductor"), strict=True):
        here = result.model(*args)
        for a, b in zip(found, (here["logits"], here["mean"]), strict=True):
            assert float((a - b).abs().max() / b.abs().max()) < 0.02


@needs_compiler
def test_wrong_inputs_are_told_before_they_are_read(
    package: tuple[planish.Optimized, Path],
) -> None:
    session = CompiledSession(package[1])
    with pytest.raises(ExportError, match=r"'x' is float32 \[2, 3, 12, 11\]; the file takes"):
        session.run([torch.randn(2, 3, 12, 11)])
    with pytest.raises(ExportError, match="float64"):
        session.run([torch.randn(2, 3, 12, 12).double()])


@needs_compiler
def test_machine_code_is_run_for_those_who_trust_it(
    package: tuple[planish.Optimized, Path],
) -> None:
    with pytest.raises(UsageError, match="machine code") as caught:
        open_candidate(str(package[1]))
    assert "--trust-code" in str(caught.value.hint)
    candidate = open_candidate(str(package[1]), trust_code=True)
    x = torch.randn(3, 3, 12, 12)
    made = candidate.run({"x": x.numpy()})
    assert set(made) == {"logits", "mean"}


def test_without_a_compiler(tmp_path: Path) -> None:
    from torch._inductor import config

    result = planish.optimize(nn.Linear(4, 4).eval(), torch.randn(2, 4), target="aotinductor")
    missing = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with missing, pytest.raises(UnsupportedError, match="needs a C\\+\\+ compiler") as caught:
        result.export(tmp_path / "model.pt2")
    assert caught.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_numbers_as_inputs_are_refused_by_name(tmp_path: Path) -> None:
    net = module(lambda self, x, count: x * count)
    result = planish.optimize(
        net,
        (torch.randn(2, 4), 3),
        dynamic_shapes=(None, Dim.DYNAMIC),
        recipe="none",
        target="aotinductor",
    )
    with pytest.raises(UnsupportedError, match="'count' is a number"):
        result.export(tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_random_operators_are_refused_by_name(tmp_path: Path) -> None:
    net = module(lambda self, x: x + torch.rand_like(x))
    result = planish.optimize(net, torch.randn(2, 4), recipe="none", target="aotinductor")
    with pytest.raises(UnsupportedError, match=r"rand_like draws random numbers") as caught:
        result.export(tmp_path / "model.pt2")
    assert caught.value.where
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_numbers_among_the_outputs(tmp_path: Path) -> None:
    net = module(lambda self, x: (x * 2, x.shape[0] + 1))
    result = planish.optimize(
        net,
        torch.randn(3, 4),
        dynamic_shapes=({0: Dim("batch", max=9)},),
        recipe="none",
        target="aotinductor",
    )
    result.export(tmp_path / "model.pt2")
    assert any("is a number; the package gives it" in text for text in result.report.remarks)
    assert CompiledSession(tmp_path / "model.pt2").run([torch.randn(5, 4)])[1] == 6


def test_another_file_is_no_package(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt2")
    with pytest.raises(UnsupportedError, match="no package of AOTInductor"):
        CompiledSession(tmp_path / "model.pt2")
