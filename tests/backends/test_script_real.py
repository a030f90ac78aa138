"""Pretrained models as files of plain torch, in a process that cannot import planish."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import planish
from planish.backends.registry import load_target
from planish.ir.compare import difference
from planish.ir.errors import ControlFlowError
from planish.tools.bench.real_models import REAL_MODELS
from tests.support.real_models import inputs, loaded
from tests.support.script_files import OPENED, answers_of

QUICK = {
    ("minilm", "torchscript"),
    ("efficientnet-lite0", "torchscript"),
    ("minilm", "torch-export"),
    ("efficientnet-lite0", "torch-export"),
}
CASES = [
    pytest.param(m.id, t, marks=[] if (m.id, t) in QUICK else pytest.mark.slow)
    for m in REAL_MODELS
    for t in OPENED
    if m.exports
]


def _tensors(structure: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(structure) if leaf is not None]


@pytest.mark.parametrize(("model_id", "target"), CASES)
def test_the_file_equals_the_model_at_two_sizes(model_id: str, target: str, tmp_path: Path) -> None:
    description, model = loaded(model_id)
    result = planish.optimize(
        model,
        inputs(model_id),
        dynamic_shapes=description.dynamic_shapes,
        target=target,
    )
    artifact = result.export(tmp_path / f"model{load_target(target).suffix}")
    assert artifact.comparison is not None
    assert len(artifact.comparison.probes) == 2  # the sample and other sizes
    assert not [name for name in artifact.operators if name.startswith("planish")]
    if target != "torch-export":  # that one cannot hold weights in a kernel's layout
        assert [name for name in artifact.operators if "_pointwise" in name]
    calls = [inputs(model_id, size) for size in (0, 1)]
    for (args, kwargs), found in zip(calls, answers_of(artifact.path, calls, target), strict=True):
        with torch.no_grad():
            of_model = _tensors(result.model(*args, **kwargs))
            of_pytorch = _tensors(model(*args, **kwargs))
        outputs = _tensors(found)
        assert difference(of_model, outputs) is None
        assert difference(of_pytorch, outputs) is None


@pytest.mark.slow
def test_a_loop_over_values_is_refused_once(tmp_path: Path) -> None:
    description, model = loaded("g2p-gru")
    with pytest.raises(ControlFlowError) as caught:
        planish.optimize(
            model,
            inputs("g2p-gru"),
            dynamic_shapes=description.dynamic_shapes,
            target="torchscript",
        ).export(tmp_path / "model.pt")
    assert caught.value.exit_code == 4
    assert caught.value.where
    assert caught.value.hint
    assert "Traceback" not in str(caught.value)
    assert not list(tmp_path.iterdir())
