"""Speed of the exported files in ONNX Runtime CPU beside the plain ``torch.onnx.export`` file.

    python -m planish.tools.bench.speed [--only REGEX] [--rounds 40] [--threads 1]

For every model: the plain file, and planish's for each target, run in alternation in one process;
the figure is the median over rounds of plain's latency divided by planish's.
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import planish
from planish.tools.bench.export_cost import export_plain
from planish.tools.bench.real_models import REAL_MODELS
from planish.tools.candidates import open_candidate
from planish.tools.timing import interleave

# The size that is timed: (batch, length) as the real models count it.
TIMED = {
    "minilm": (1, 128),
    "efficientnet-lite0": (1, 224),
    "dinov2-s": (1, 224),
    "smollm2-135m": (1, 64),
    "crnn-english-g2": (1, 200),
}
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any, tuple[Any, ...], dict[str, Any]]


def _real(model_id: str) -> Case:
    description = next(m for m in REAL_MODELS if m.id == model_id)
    args, kwargs = description.inputs(*description.sizes[0])
    timed_args, timed_kwargs = description.inputs(*TIMED[model_id])
    return (
        description.load(),
        args,
        kwargs,
        description.dynamic_shapes,
        timed_args,
        timed_kwargs,
    )


def _timm(name: str) -> Case:
    from planish.tools.bench.torchvision_shim import import_timm

    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    image = torch.randn(2, 3, 224, 224)
    return model, (image,), {}, ({0: Dim("batch", max=64)},), (image[:1],), {}


def cases() -> dict[str, Callable[[], Case]]:
    """Every model that is timed, by name."""
    real = {m.id: partial(_real, m.id) for m in REAL_MODELS if m.exports}
    random = ("resnet50", "vit_tiny_patch16_224", "mobilenetv3_small_100", "convnext_atto")
    return {**real, **{f"{name} (random weights)": partial(_timm, name) for name in random}}


def measure(case: Case, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Time one model; candidate name -> figures."""
    model, args, kwargs, shapes, timed_args, timed_kwargs = case
    with tempfile.TemporaryDirectory() as folder:
        paths = {"plain": Path(folder) / "plain.onnx"}
        export_plain(model, args, kwargs, shapes, str(paths["plain"]))
        for target in ("onnxruntime-cpu", "onnx"):
            paths[target] = Path(folder) / f"{target}.onnx"
            result = planish.optimize(model, (args, kwargs), dynamic_shapes=shapes, target=target)
            result.export(paths[target])
        opened = {name: open_candidate(str(p), threads=threads) for name, p in paths.items()}
        leaves = pytree.tree_leaves((timed_args, timed_kwargs))
        values = [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        feeds = {
            name: dict(zip([s.name for s in c.slots], values, strict=True))
            for name, c in opened.items()
        }
        runs = [partial(c.run, feeds[name]) for name, c in opened.items()]
        timings = interleave(runs, rounds=rounds)
    return {name: asdict(timing) for name, timing in zip(opened, timings, strict=True)}


@click.command()
@click.option("--only", default=".*", help="Regular expression for model names.")
@click.option("--rounds", default=40, show_default=True, help="Timed rounds.")
@click.option("--threads", default=1, show_default=True, help="Threads within an operator.")
@click.option("--output", type=click.Path(path_type=Path), help="Write all figures as JSON.")
def main(only: str, rounds: int, threads: int, output: Path | None) -> None:
    """Print one line per model and target."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)  # for tracing and verification; sessions take their own number
    results = {}
    for name, make in cases().items():
        if not re.search(only, name):
            continue
        results[name] = figures = measure(make(), rounds, threads)
        for candidate, f in figures.items():
            print(
                f"{name:40} {candidate:16} {f['median_ms']:8.2f} ms  {f['ratio']:5.2f}x "
                f"({f['low']:.2f}-{f['high']:.2f})",
                flush=True,
            )
    if output is not None:
        output.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
