"""The named recipes on networks of every kind: each gives a file that keeps its promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planish
from planish.backends.ort_run import Session
from planish.ir.compare import cosine
from planish.ir.errors import RecipeError
from planish.passes.base import Contract
from planish.passes.quantize.keep_float import KeepFloat
from planish.passes.recipe import RECIPES, Recipe
from planish.passes.recipe_options import with_bound, with_choice, with_padding_mask
from planish.tools.bench import real_inputs
from tests.support import real_models

QUANTIZING = [name for name in RECIPES if name not in ("none", "exact")]


class Pictures(nn.Module):
    """Convolutions with a batch norm and a residual, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.stem(x)))
        y = F.relu(y + self.body(y))
        result: Tensor = self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return result


class Words(nn.Module):
    """An embedding, attention under a padding mask, a gated layer; padding is garbage."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        x = self.norm(x + self.o(y.transpose(1, 2).flatten(2)))
        result: Tensor = x + self.down(F.gelu(self.up(x)))
        return result


def _pictures() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return Pictures().eval(), [(torch.randn(2, 3, 12, 12),) for _ in range(8)]


def _words() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    return Words().eval(), [(torch.randint(0, 64, (2, 12)), mask) for _ in range(8)]


_NETS = {"pictures": _pictures, "words": _words}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("net", list(_NETS))
@pytest.mark.parametrize("recipe", QUANTIZING)
def test_every_recipe_works_for_every_network(
    recipe: str, net: str, masked: bool, tmp_path: Path
) -> None:
    if masked and net == "pictures":
        pytest.skip("pictures have no padding")
    module, batches = _NETS[net]()
    if net == "pictures" and recipe == "int4-weight":
        batches = batches[:4]
    result = planish.optimize(
        module,
        batches[0],
        recipe=recipe,
        calibration=batches,
        padding_mask="mask" if masked else None,
    )
    path = tmp_path / "model.onnx"
    result.export(path)
    outputs = Session(path, threads=1).run(batches[0])
    expected = module(*batches[0])
    assert cosine(expected, torch.from_numpy(np.array(outputs[0]))) > 0.97
    assert result.recipe.alternatives == {}
    again = planish.optimize(module, batches[0], recipe=result.recipe, calibration=batches)
    assert str(again.program) == str(result.program)
    if result.report.race is None:
        assert any(p.contract == "lossy" and p.changes for p in result.report.passes)
        assert result.report.held_out is not None
        assert result.report.held_out.batches == 1


@pytest.mark.parametrize("recipe", QUANTIZING)
def test_every_recipe_is_lossy_somewhere(recipe: str) -> None:
    found = Recipe.parse(recipe)
    every = [found, *map(Recipe.parse, found.alternatives.values())]
    assert any(p.contract is Contract.LOSSY for one in every for p in one.passes)


def test_int8_stands_alone_and_has_a_floor() -> None:
    with pytest.raises(RecipeError, match="stands alone"):
        Recipe.parse("int8,eliminate-dead-code")
    found = Recipe.parse("int8")
    assert found.passes == Recipe.parse("exact").passes
    for text in found.alternatives.values():
        (keep,) = [p for p in Recipe.parse(text).passes if isinstance(p, KeepFloat)]
        assert keep.min_sqnr_db == 12


def test_a_bound_goes_into_every_alternative() -> None:
    found = with_bound(Recipe.parse("int8"), min_cosine=0.99, min_metric=None)
    assert found.passes == Recipe.parse("exact").passes  # nothing lossy: no bound
    for text in found.alternatives.values():
        (keep,) = [p for p in Recipe.parse(text).passes if isinstance(p, KeepFloat)]
        assert (keep.min_cosine, keep.min_sqnr_db) == (0.99, 12)
    plain = with_bound(Recipe.parse("int8-static"), min_sqnr_db=30.0)
    assert plain.passes[-1] == KeepFloat(min_sqnr_db=30.0)
    assert with_bound(plain, min_sqnr_db=None) == plain


def test_a_mask_goes_into_every_pass_that_takes_one() -> None:
    found = with_padding_mask(Recipe.parse("int8"), "mask")
    assert found is not None
    for text in found.alternatives.values():
        for pass_ in Recipe.parse(text).passes:
            if "mode=dynamic" not in text or pass_.name != "quantize":  # its ranges need no data
                assert getattr(pass_, "padding_mask", "mask") == "mask", pass_
        assert "padding_mask=mask" in text
    assert with_padding_mask(Recipe.parse("exact"), "mask") is None


def test_a_choice_goes_into_every_pass_that_takes_one() -> None:
    found = with_choice(Recipe.parse("int8-static"), ("aten.linear",), ("head",))
    for pass_ in found.passes:
        where: Any = getattr(pass_, "where", None)
        if where is not None:
            assert where.include == ("aten.linear",)
            assert where.exclude == ("head",)
    assert "where={include=[aten.linear],exclude=[head]}" in str(found)


def test_unused_arguments_are_said() -> None:
    module, batches = _words()
    result = planish.optimize(module, batches[0], padding_mask="mask", metric=lambda a, b: 1.0)
    said = " ".join(result.report.remarks)
    assert "padding_mask was given, but no pass of the recipe asks for it" in said
    assert "metric was given, but no pass of the recipe asks for it" in said


@pytest.mark.slow
def test_minilm_is_quantized_whole_and_right(tmp_path: Path) -> None:
    """Every linear layer runs an integer kernel; held-out sentences keep their direction."""
    description, module = real_models.loaded("minilm")
    sentences = dict(real_inputs.sentence_batch(24, 48))
    batches = [{k: v[i : i + 2] for k, v in sentences.items()} for i in range(0, 24, 2)]
    result = planish.optimize(
        module,
        batches[0],
        recipe="int8-static",
        calibration=batches,
        padding_mask="attention_mask",
        dynamic_shapes=description.dynamic_shapes,
        verify="off",
    )
    assert result.report.held_out is not None
    assert result.report.held_out.score.fidelity.cosine > 0.99
    artifact = result.export(tmp_path / "minilm.onnx")
    assert len(artifact.kernels) >= 36
    assert [use.node for use in artifact.kernels if use.kernel is None] == []
    weights = [t for t in onnx.load(artifact.path).graph.initializer if len(t.dims) == 2]
    floats = [t.name for t in weights if t.data_type == onnx.TensorProto.FLOAT]
    assert all("embedding" in name for name in floats), floats
