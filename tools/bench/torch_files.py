"""Speed of the files for plain torch beside eager PyTorch, on one thread.

    python -m planish.tools.bench.torch_files [--only REGEX] [--target NAME]... [--rounds 40]

For every real model: eager, and for each target the file of the ``exact`` recipe, for two models
that of ``int8-static`` too, run in alternation in one process; the figure is the median over
rounds of eager's latency divided by the file's. Fidelity is that of all outputs on inputs that
calibrated nothing.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import planish
from planish.backends.registry import load_backend
from planish.ir.compare import measure
from planish.tools.bench.real_models import REAL_MODELS, RealModel
from planish.tools.bench.speed import TIMED
from planish.tools.timing import interleave

TARGETS = ("torchscript", "torch-export", "aotinductor")
Opened = Callable[[Sequence[Any]], object]
_QUANTIZED = ("minilm", "efficientnet-lite0")
_CALIBRATION = range(2, 10)  # batch sizes: each draws other sentences or crops


def _flat(tree: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - whatever a model takes or gives
    return tuple(t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))


def _file(model: RealModel, net: nn.Module, recipe: str, target: str, folder: Path) -> Opened:
    args, kwargs = model.inputs(*model.sizes[0])
    calibration = None
    if recipe != "exact":
        calls = [model.inputs(batch, model.sizes[0][1]) for batch in _CALIBRATION]
        calibration = [k or a for a, k in calls]
    result = planish.optimize(
        net,
        (args, kwargs),
        dynamic_shapes=model.dynamic_shapes,
        recipe=recipe,
        calibration=calibration,
        target=target,
    )
    backend = load_backend(target)
    path = folder / f"{target}.{recipe}{backend.target.suffix}"
    result.export(path)
    return backend.opened(path)


@click.command()
@click.option("--only", default=".*", help="Regular expression for model names.")
@click.option("--target", "targets", multiple=True, default=TARGETS, help="Repeat for more.")
@click.option("--rounds", default=40, show_default=True, help="Timed rounds.")
def main(only: str, targets: tuple[str, ...], rounds: int) -> None:
    """Print one line per model and file."""
    warnings.simplefilter("ignore")
    for model in REAL_MODELS:
        if not model.exports or not re.search(only, model.id):
            continue
        net = model.load()
        args, kwargs = model.inputs(*TIMED[model.id])
        recipes = ("exact", "int8-static") if model.id in _QUANTIZED else ("exact",)
        kinds = [(recipe, target) for recipe in recipes for target in targets]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            with torch.inference_mode(mode=False):
                files = [_file(model, net, r, t, Path(folder)) for r, t in kinds]
            torch.set_num_threads(1)
            runs: list[Callable[[], Any]] = [partial(net, *args, **kwargs)]
            runs += [partial(run, _flat((args, kwargs))) for run in files]
            expected = _flat(runs[0]())
            fidelities = [measure(expected, _flat(run())) for run in runs]
            timings = interleave(runs, rounds=rounds)
        names = ["eager", *(f"{recipe}, {target}" for recipe, target in kinds)]
        for name, timing, fidelity in zip(names, timings, fidelities, strict=True):
            print(
                f"{model.id:20} {name:26} {timing.median_ms:8.2f} ms  {timing.ratio:5.2f}x "
                f"({timing.low:.2f}-{timing.high:.2f})  {fidelity.sqnr_db:6.1f} dB",
                flush=True,
            )


if __name__ == "__main__":
    main()
