"""Exported programs: what ``.pt2`` files hold, that plain torch runs them, what they refuse."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import planish
from planish.backends.pt2_run import ExportedSession
from planish.backends.registry import load_backend
from planish.backends.torch_backend import lower
from planish.backends.torch_stepwise import run_lowered
from planish.ir import load
from planish.ir.compare import difference
from planish.ir.errors import ExportError, PlanishError, UnsupportedError
from planish.ir.execute import run
from tests.support.real_models import inputs, loaded
from tests.support.script_files import Call, answers_of, module, written

X = torch.randn(3, 8)


def _leaves(structure: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(structure) if leaf is not None]


def _file(model: nn.Module, path: Path, args: tuple[Any, ...], **options: Any) -> planish.Optimized:
    return written(model, path, args, target="torch-export", **options)


@pytest.mark.parametrize(
    "recipe", ["int8-dynamic", pytest.param("int4-weight", marks=pytest.mark.slow)]
)
def test_quantized_minilm_in_plain_torch(recipe: str, tmp_path: Path) -> None:
    description, model = loaded("minilm")
    result = planish.optimize(
        model,
        inputs("minilm"),
        dynamic_shapes=description.dynamic_shapes,
        recipe=recipe,
        target="torch-export",
    )
    artifact = result.export(tmp_path / "model.pt2")
    assert not [name for name in artifact.operators if name.startswith("planish")]
    assert artifact.comparison is not None
    assert artifact.comparison.stepwise is not None
    assert artifact.comparison.stepwise.max_steps <= 1
    linears = [use for use in artifact.kernels if use.operator == "aten.linear"]
    integer = {use.kernel for use in linears}
    assert integer == ({"aten::_int_mm"} if recipe == "int8-dynamic" else {None})
    told = "become real numbers in every run" in " ".join(result.report.remarks)
    assert told is (recipe == "int4-weight")
    calls = [inputs("minilm", size) for size in (0, 1)]
    for (args, kwargs), found in zip(
        calls, answers_of(artifact.path, calls, "torch-export"), strict=True
    ):
        for a, b in zip(_leaves(found), _leaves(result.model(*args, **kwargs)), strict=True):
            # Roundings that fall the other way drift apart through six layers.
            bound = 0.12 if recipe == "int8-dynamic" else 1e-5
            assert float((a - b).abs().max() / b.abs().max()) < bound


@pytest.mark.parametrize("low", [-3.0, -1.0, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_integer_products_are_exact_at_the_extremes(low: float, bias: bool) -> None:
    """Codes of 0 and 255 against weights of -127 and 127, any zero point."""
    torch.manual_seed(0)
    net = nn.Linear(64, 16, bias=bias)
    with torch.no_grad():
        net.weight.copy_(torch.where(torch.rand(16, 64) < 0.5, -1.0, 1.0))
    x = torch.where(torch.rand(2, 5, 64) < 0.5, low, low + 3.0)
    program = planish.optimize(
        net.eval(), x, recipe="int8-static", calibration=[(x,)], target="torch-export"
    ).program
    lowered = lower(program, exportable=True)
    assert [use.kernel for use in lowered.kernels] == ["aten::_int_mm"]
    made = run_lowered(lowered, [x])[lowered.graph.output_node().all_input_nodes[0]]
    assert difference(run(program, [x]), [made]) is None


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_integer_products_of_any_rank_and_size(rank: int, tmp_path: Path) -> None:
    net = nn.Linear(8, 6).eval()
    x = torch.randn(*[2, 3, 4][: rank - 1], 8)
    dynamic = ({0: Dim("rows", max=9)},) if rank > 1 else None
    result = planish.optimize(
        net,
        x,
        recipe="int8-static",
        calibration=[(x,)],
        dynamic_shapes=dynamic,
        target="torch-export",
    )
    artifact = result.export(tmp_path / "model.pt2")
    assert {use.kernel for use in artifact.kernels} == {"aten::_int_mm"}
    assert artifact.comparison is not None
    assert len(artifact.comparison.probes) == 2


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


pytree.register_dataclass(Answer)

_STYLES: dict[str, tuple[Callable[..., Any], str]] = {
    "dict": (lambda a, b: {"a": a, "b": [b, None]}, ""),
    "tuple": (lambda a, b: (a, (b, 3)), ""),
    "named": (Pair, "the output is a Pair; the file makes it a tuple"),
    "dataclass": (Answer, "the output is a Answer; the file makes it a dict of the same fields"),
}


@pytest.mark.parametrize("style", list(_STYLES))
def test_structures_need_no_class_of_the_caller(style: str, tmp_path: Path) -> None:
    made, remark = _STYLES[style]
    net = module(lambda self, x, y=None: made(self.linear(x), x + 1), linear=nn.Linear(8, 8))
    result = _file(net, tmp_path / "model.pt2", (X,))
    told = [text for text in result.report.remarks if "the file makes it" in text]
    assert told == ([remark] if remark else [])
    (found,) = answers_of(tmp_path / "model.pt2", [((X,), {})], "torch-export")
    assert difference(_leaves(net(X)), _leaves(found)) is None


def test_names_and_ranges_are_kept(tmp_path: Path) -> None:
    net = module(lambda self, tokens, mask: (tokens * mask).sum(1))
    batch = Dim("batch", min=2, max=5)
    _file(net, tmp_path / "m.pt2", (X, X), dynamic_shapes=({0: batch}, {0: batch}))
    session = ExportedSession(tmp_path / "m.pt2")
    assert session.metadata is not None
    assert [i["shape"] for i in session.metadata["inputs"]] == [["batch", 8], ["batch", 8]]
    program = load(tmp_path / "m.pt2")  # the checking loader reads it: nothing in it is pickled
    assert program.signature.input_names == ("tokens", "mask")
    assert set(program.signature.ranges.values()) == {(2, 5)}
    with pytest.raises(ExportError, match="fails on these inputs"):
        ExportedSession(tmp_path / "m.pt2").run([torch.randn(3, 8), torch.randn(3, 7)])


def test_what_torch_cannot_read_back_is_one_error(tmp_path: Path) -> None:
    net = module(lambda self, x: (x * 2, "a name"))
    result = planish.optimize(net, X, recipe="none", target="torch-export")
    with pytest.raises(UnsupportedError, match="cannot read back") as caught:
        result.export(tmp_path / "model.pt2")
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_codes_of_weights_stay_small_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    x = torch.randn(16, 256)
    result = planish.optimize(
        net, x, recipe="int4-weight", calibration=[(x,)], target="torch-export"
    )
    artifact = result.export(tmp_path / "model.pt2")
    assert artifact.bytes < 0.25 * sum(p.nbytes for p in net.parameters())
    assert all("dequantized" in use.reason for use in artifact.kernels)
    assert any("become real numbers in every run" in text for text in result.report.remarks)
    (found,) = answers_of(artifact.path, [((x,), {})], "torch-export")
    assert difference([result.model(x)], found) is None


def test_sizes_are_checked_by_the_file(tmp_path: Path) -> None:
    net = module(lambda self, x: x * 2)
    shapes = ({0: Dim("batch", min=2, max=5)},)
    result = _file(net, tmp_path / "model.pt2", (X,), dynamic_shapes=shapes)
    assert not [text for text in result.report.remarks if "no runtime checks" in text]
    with pytest.raises(ExportError, match="fails on these inputs"):
        ExportedSession(tmp_path / "model.pt2", own=True).run([torch.randn(6, 8)])


def test_branches_stay_branches(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: self.a(v), lambda v: v - 1, (x,))

    net = module(forward, a=nn.Linear(8, 8))
    _file(net, tmp_path / "model.pt2", (X,))
    calls: list[Call] = [((X.abs(),), {}), ((-X.abs(),), {})]
    for (args, _), found in zip(
        calls, answers_of(tmp_path / "model.pt2", calls, "torch-export"), strict=True
    ):
        assert difference([net(*args)], found) is None


_TWICE = """
import sys, torch, planish
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
x = torch.randn(3, 8)
result = planish.optimize(net, x, recipe="int8-dynamic", target="torch-export")
result.export(sys.argv[1] + "/model.pt2")
"""


def test_equal_programs_make_equal_files(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        subprocess.run([sys.executable, "-c", _TWICE, str(tmp_path / name)], check=True)
        contents.append((tmp_path / name / "model.pt2").read_bytes())
    assert contents[0] == contents[1]


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    net = module(lambda self, x: torch.fft.fft(x).abs() @ self.w, w=torch.eye(8))
    result = planish.optimize(net, X, recipe="none", target="torch-export")
    assert result.export(tmp_path / "complex.pt2").path.is_file()  # complex values are fine
    torch.save({"a": X}, tmp_path / "pickle.pt2")
    with pytest.raises(PlanishError, match=r"pickle|archive"):
        load_backend("torch-export").run(tmp_path / "pickle.pt2", [X])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["complex.pt2", "pickle.pt2"]


def test_convolutions_have_integer_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval()
    samples = [(torch.randn(2, 3, 12, 12),) for _ in range(3)]
    result = planish.optimize(
        net, samples[0], recipe="int8-static", calibration=samples, target="torch-export"
    )
    artifact = result.export(tmp_path / "model.pt2")
    assert {use.kernel for use in artifact.kernels} == {"onednn::qconv_pointwise"}
    (found,) = answers_of(artifact.path, [(samples[0], {})], "torch-export")
    here = result.model(*samples[0])
    assert float((found[0] - here).abs().max() / here.abs().max()) < 0.02


def test_metadata_says_how_it_was_made(tmp_path: Path) -> None:
    _file(nn.Linear(8, 4).eval(), tmp_path / "model.pt2", (X,))
    metadata = ExportedSession(tmp_path / "model.pt2").metadata
    assert metadata is not None
    assert metadata["target"] == "torch-export"
    assert json.loads(metadata["fidelity"]) is None or metadata["recipe"]
