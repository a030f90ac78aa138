"""Pretrained models in integer kernels: within one step of the program, in any process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import planish
from planish.backends.script_run import ScriptSession
from planish.backends.torch_stepwise import saturates_here
from tests.support.real_models import inputs, loaded
from tests.support.script_files import answers_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(saturates_here(), reason="this processor adds pairs in 16 bits"),
]


def _batch(model_id: str, size: int) -> Any:
    args, kwargs = inputs(model_id, size)
    return args or kwargs


@pytest.mark.parametrize(
    ("model_id", "recipe", "kernel"),
    [
        ("efficientnet-lite0", "int8-static", "onednn::qconv2d_pointwise"),
        ("crnn-english-g2", "int8-static", "onednn::qconv2d_pointwise"),
        ("dinov2-s", "int8-dynamic", "onednn::qlinear_pointwise"),
        ("minilm", "int8-static", "onednn::qlinear_pointwise"),
    ],
)
def test_every_operator_is_within_a_step(
    model_id: str, recipe: str, kernel: str, tmp_path: Path
) -> None:
    description, model = loaded(model_id)
    result = planish.optimize(
        model,
        inputs(model_id),
        dynamic_shapes=description.dynamic_shapes,
        recipe=recipe,
        calibration=[_batch(model_id, 0), _batch(model_id, 1)],
        target="torchscript",
        verify="end",
    )
    artifact = result.export(tmp_path / "model.pt")
    assert artifact.operators[kernel] > 3
    assert artifact.comparison is not None
    assert len(artifact.comparison.probes) == 2
    assert artifact.comparison.stepwise is not None
    assert artifact.comparison.stepwise.max_steps <= 1
    session = ScriptSession(artifact.path)
    calls = [inputs(model_id, size) for size in (0, 1)]
    for (args, kwargs), found in zip(calls, answers_of(artifact.path, calls), strict=True):
        here = session.run(result.program.signature.flatten(args, kwargs))
        pairs = list(zip(pytree.tree_leaves(here), found, strict=True))
        assert pairs
        for mine, theirs in pairs:
            if mine is not None:
                scale = float(mine.abs().max())
                assert torch.allclose(mine, theirs, rtol=0.0, atol=0.02 * scale)
