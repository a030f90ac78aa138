"""Microbenchmarks behind the lowering choices, and the cache of their results.

Each builds a small program that is nothing but the operator in question, emits it in both forms,
and runs them in turn on one thread. The figure is the ratio of the fastest runs: the minimum is
what the machine can do; everything above it is other processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planish.ir.operators  # noqa: F401 - registers torch.ops.planish
from planish.ir.capture import capture
from planish.ir.program import Program

# An alternative has to be faster than the default by this much to be taken.
MARGIN = 1.05

_ROUNDS = 24
_WARM_UP = 3
_REPEATS = 4  # of the operator in one file, so that the runtime's fixed cost weighs little
_VERSION = 1  # of the benchmarks: part of the cache's key


def wins(ratio: float) -> bool:
    """Whether an alternative of this speed, relative to the default, is taken."""
    return ratio > MARGIN


# -- what is measured -------------------------------------------------------------------------


class _Residual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(_REPEATS):
            x = F.layer_norm(x + x.neg(), (384,))
        return x


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(384, 384) for _ in range(_REPEATS)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(_REPEATS):
            heads = x.view(1, 128, 12, 32).transpose(1, 2)
            y = F.scaled_dot_product_attention(heads, heads, heads)
            x = y.transpose(1, 2).reshape(1, 128, 384)
        return x


class _RmsNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(_REPEATS):
            x = F.rms_norm(x, (384,))
        return x


class _Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(128)[:, None] * torch.linspace(0.01, 1, 16)
        self.cos = nn.Buffer(torch.cat([angle, angle], -1).cos())
        self.sin = nn.Buffer(torch.cat([angle, angle], -1).sin())

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(1, 128, 12, 32).transpose(1, 2)
        for _ in range(_REPEATS):
            heads = torch.ops.planish.rotary_embedding(heads, self.cos, self.sin)
        return heads.transpose(1, 2).reshape(1, 128, 384)


class _Stem(nn.Module):
    """The first convolution of a picture, already written in integers."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-127, 128, (32, 3, 3, 3), dtype=torch.int8)
        self.weight, self.scale = nn.Buffer(codes), nn.Buffer(torch.full((32,), 0.001))
        self.none = nn.Buffer(torch.zeros(32, dtype=torch.int8))
        self.step, self.zero = nn.Buffer(torch.tensor(0.02)), nn.Buffer(torch.tensor(128).byte())

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.planish
        x = q.quantize(x, self.step, self.zero, dtype="uint8")
        x = q.dequantize(x, self.step, self.zero, dtype="uint8")
        weight = q.dequantize(self.weight, self.scale, self.none, dtype="int8", axis=0)
        y = q.quantize(F.conv2d(x, weight, None, 2, 1), self.step, self.zero, dtype="uint8")
        y = q.dequantize(y, self.step, self.zero, dtype="uint8")
        result: Tensor = y.amax(1)  # little to do, for either form
        return result


class _Wide(nn.Module):
    """Convolutions of integers, each with 5 MiB of weights on 49 pixels."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-127, 128, (2, 768, 768, 3, 3), dtype=torch.int8)
        self.codes = nn.ParameterList(nn.Parameter(c.clone(), requires_grad=False) for c in codes)
        self.scale = nn.Buffer(torch.full((768,), 2.0**-13))
        self.none = nn.Buffer(torch.zeros(768, dtype=torch.int8))
        self.step, self.zero = nn.Buffer(torch.tensor(0.02)), nn.Buffer(torch.tensor(128).byte())

    def forward(self, x: Tensor) -> Tensor:
        q, dq = torch.ops.planish.quantize, torch.ops.planish.dequantize
        step = (self.step, self.zero)
        x = dq(q(x, *step, dtype="uint8"), *step, dtype="uint8")
        for codes in self.codes:
            weight = dq(codes, self.scale, self.none, dtype="int8", axis=0)
            y = F.conv2d(x, weight, None, 1, 1)
            x = dq(q(y, *step, dtype="uint8"), *step, dtype="uint8")
        return x


class _IntegerAttention(nn.Module):
    """Self-attention on codes: three products, or one whose result is split."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint = joint
        codes = torch.randint(-127, 128, (_REPEATS, 3 * 384, 384), dtype=torch.int8)
        self.weights = nn.ParameterList(
            nn.Parameter(w.clone(), requires_grad=False)
            for layer in codes
            for w in ([layer] if joint else layer.chunk(3))
        )
        width = len(self.weights[0])
        self.scale = nn.Buffer(torch.full((width,), 2.0**-11))
        self.zero = nn.Buffer(torch.zeros(width, dtype=torch.int8))
        self.step = nn.Buffer(torch.tensor(2.0**-5))
        self.middle = nn.Buffer(torch.tensor(128, dtype=torch.uint8))
        self.bias = nn.Buffer(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        q, dq = torch.ops.planish.quantize, torch.ops.planish.dequantize
        step = (self.step, self.middle)
        each = len(self.weights) // _REPEATS
        for layer in range(_REPEATS):
            y = dq(q(x, *step, dtype="uint8"), *step, dtype="uint8")
            made = [
                F.linear(y, dq(w, self.scale, self.zero, dtype="int8", axis=0), self.bias)
                for w in self.weights[layer * each : (layer + 1) * each]
            ]
            parts = made[0].chunk(3, -1) if self.joint else made
            heads = [part.view(1, 128, 12, 32).transpose(1, 2) for part in parts]
            y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
            x = x + y.transpose(1, 2).reshape(1, 128, 384)
        return x


class _Weights(nn.Module):
    """Linears with weights of 4 bits in blocks of 32, on 128 rows."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(0, 16, (_REPEATS, 384, 384), dtype=torch.uint8)
        self.codes = nn.ParameterList(nn.Parameter(c.clone(), requires_grad=False) for c in codes)
        self.scale = nn.Buffer(torch.full((384, 12), 2.0**-6))
        self.zero = nn.Buffer(torch.full((384, 12), 8, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        dq = torch.ops.planish.dequantize
        for codes in self.codes:
            weight = dq(codes, self.scale, self.zero, dtype="uint4", axis=1, block_size=32)
            x = F.linear(x, weight)
        return x


_SUBJECTS: dict[str, Callable[[], nn.Module]] = {
    "residual": _Residual,
    "linear": _Linear,
    "attention": _Attention,
    "rms-norm": _RmsNorm,
    "rotary": _Rotary,
    "stem": _Stem,
    "wide": _Wide,
    "integer-attention": partial(_IntegerAttention, joint=False),
    "parts": partial(_IntegerAttention, joint=True),
    "weights": _Weights,
}
# Of the input; others take 128 tokens of 384 features.
_SHAPES = {"stem": (1, 3, 224, 224), "wide": (1, 768, 7, 7)}


def measure(name: str) -> float:
    """Speed of a choice's alternative relative to its default: 1.2 is 20% faster."""
    from planish.backends.onnx_view import Style
    from planish.backends.ort_legalize import CHOICES

    choice = next(c for c in CHOICES if c.name == name)
    field = name.replace("-", "_")
    fast = {"attention": "operator", "rms_norm": "operator", "rotary": "operator"}
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(_SHAPES.get(name, (1, 128, 384)), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = capture(_SUBJECTS[name]().eval().requires_grad_(False), (sample,))
    styles = [
        Style(**{**fast, field: form}, integers="onnxruntime")
        for form in (choice.default, choice.alternative)
    ]
    return _race(program, styles, sample)


def _race(program: Program, styles: list[Any], sample: Tensor) -> float:
    """Fastest run of the first style over the fastest of the second, interleaved."""
    from planish.backends.onnx_build import build
    from planish.backends.onnx_file import write_model
    from planish.backends.onnx_translate import emit
    from planish.backends.ort_run import Session

    best = [float("inf")] * len(styles)
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        sessions = []
        for position, style in enumerate(styles):
            path = Path(folder) / f"{position}.onnx"
            model, initializers, _ = build(emit(program, 23, style), {})
            write_model(model, initializers, path, external_data_bytes=2**30)
            sessions.append(Session(path, threads=1))
        for session in sessions:
            for _ in range(_WARM_UP):
                session.run([sample])
        for _ in range(_ROUNDS):
            for position, session in enumerate(sessions):
                start = time.perf_counter()
                session.run([sample])
                best[position] = min(best[position], time.perf_counter() - start)
    return best[0] / best[1]


# -- the cache --------------------------------------------------------------------------------


def speed_of_alternative(name: str, remark: Callable[[str], None]) -> float:
    """The measured ratio of a choice, from the cache where it was measured before."""
    ratio = _read().get(name)
    if ratio is None:
        ratio = _measure_once(name)
        remark(f"measured lowering {name}: the alternative runs at {ratio:.2f}x of the default")
        _write(name, ratio, remark)
    return ratio


@cache
def _measure_once(name: str) -> float:
    return measure(name)


def cache_file() -> Path:
    """Where results are kept: one file per machine and runtime version."""
    import onnxruntime

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    facts = f"{_VERSION}|{onnxruntime.__version__}|{_processor()}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return root / "planish" / f"lowering-{digest}.json"


def _processor() -> str:
    """The processor's model, and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "CPU part", "Features")
    return "|".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _read() -> dict[str, float]:
    try:
        loaded = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # not there yet, or damaged: measured anew
        return {}
    if not isinstance(loaded, dict):
        return {}
    return {str(k): float(v) for k, v in loaded.items() if isinstance(v, (int, float))}


def _write(name: str, ratio: float, remark: Callable[[str], None]) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
        with os.fdopen(handle, "w") as file:
            json.dump({**_read(), name: round(ratio, 4)}, file, sort_keys=True, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        remark(f"lowering choices are measured again each time: {path} cannot be written ({error})")
