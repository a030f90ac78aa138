"""Quantized standard files answer in OpenVINO what their programs answer."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from planish.backends.base import ExportOptions
from planish.backends.registry import load_backend
from planish.ir.compare import sqnr_db
from planish.ir.execute import run
from planish.passes.base import PassContext
from planish.passes.calibrate import spool
from planish.passes.quantize.quantize import Quantize
from tests.passes.quantize.nets import captured, conv, linear, normal, seeded

CASES: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
    "linear": (lambda m, x: m.c(x), normal(5, 32), {"c": linear(32, 16)}),
    "vector": (lambda m, x: m.c(x), normal(32), {"c": linear(32, 16, bias=False)}),
    "mlp": (
        lambda m, x: m.d(F.gelu(m.c(x))),
        normal(5, 32),
        {"c": linear(32, 64), "d": linear(64, 16)},
    ),
}
BETWEEN = {
    "relu": F.relu,
    "hardswish": F.hardswish,
    "maxpool": lambda y: F.max_pool2d(y, 3, 2, 1),
    "avgpool": lambda y: F.avg_pool2d(y, 3, 1, 1),
    "average": lambda y: F.adaptive_avg_pool2d(y, 1),
    "largest": lambda y: F.adaptive_max_pool2d(y, 1),
    "smallest": lambda y: y.amin((2, 3), keepdim=True),
    "cat": lambda y: torch.cat([y, F.relu(y)], 1)[:, 4:12],
    "stack": lambda y: torch.stack([y, F.relu(y)], 2).flatten(1, 2)[:, 4:12],
}
for _name, _f in BETWEEN.items():
    CASES[_name] = (
        lambda m, x, f=_f: m.b(f(m.a(x))),
        normal(2, 4, 8, 8),
        {"a": conv(4, 8), "b": conv(8, 4)},
    )
CASES["short block"] = (lambda m, x: m.a(x), normal(2, 20, 8, 8), {"a": conv(20, 8)})
for _kind in (nn.LSTM, nn.GRU):
    for _how in ({}, {"batch_first": True}, {"bidirectional": True}):
        CASES[" ".join([_kind.__name__, *_how])] = (
            lambda m, x: m.c(m.r(m.p(x))[0]),
            normal(7, 3, 12),
            {
                "p": linear(12, 12),
                "r": seeded(partial(_kind, 12, 16, **_how)),
                "c": linear(32 if "bidirectional" in _how else 16, 5),
            },
        )

OPTIONS: dict[str, dict[str, Any]] = {
    "static": {},
    "signed": {"saturation": "signed"},
    "asymmetric": {"weights": "uint8", "symmetric": False},
    "dynamic": {"mode": "dynamic"},
    "weight": {"mode": "weight"},
    "half bytes": {"mode": "weight", "weights": "int4"},
    "blocks": {"mode": "weight", "weights": "uint4", "granularity": "block", "block_size": 16},
}


# Convolutions have no ranges at run time.
CONVOLUTIONS = {*BETWEEN, "short block"}
PAIRS = [(c, o) for c in CASES for o in OPTIONS if not (o == "dynamic" and c in CONVOLUTIONS)]


@pytest.mark.parametrize(("case", "options"), PAIRS)
def test_openvino_answers_as_the_program(case: str, options: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    f, x, parts = CASES[case]
    program = captured(f, x, **parts)
    context = PassContext(calibration=spool([(x,), (normal(*x.shape, seed=1),)], program))
    program = Quantize(**OPTIONS[options]).run(program, context).program
    path = load_backend("onnx").export(program, tmp_path / "m.onnx", ExportOptions()).path
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    (expected,) = run(program, (x,))
    assert sqnr_db(expected, torch.from_numpy(np.array(compiled([x.numpy()])[0]))) > 25
