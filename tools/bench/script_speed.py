"""Speed of TorchScript files beside eager PyTorch, on one thread.

    python -m planish.tools.bench.script_speed [--only REGEX] [--rounds 40]

For every real model: eager, the file of the ``exact`` recipe, and (``--quantized``) that of
``int8-static``, run in alternation in one process; the figure is the median over rounds of eager's
latency divided by the file's. Fidelity is that of all outputs on inputs that calibrated nothing.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import planish
from planish.backends.script_run import ScriptSession
from planish.ir.compare import measure
from planish.tools.bench.real_models import REAL_MODELS, RealModel
from planish.tools.bench.speed import TIMED
from planish.tools.timing import interleave

_QUANTIZED = ("minilm", "efficientnet-lite0")
_CALIBRATION = range(2, 10)  # batch sizes: each draws other sentences or crops


def _flat(tree: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - whatever a model takes or gives
    return tuple(t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))


def _file(model: RealModel, net: nn.Module, recipe: str, path: Path) -> ScriptSession:
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
        target="torchscript",
    )
    result.export(path)
    return ScriptSession(path, threads=1)


@click.command()
@click.option("--only", default=".*", help="Regular expression for model names.")
@click.option("--rounds", default=40, show_default=True, help="Timed rounds.")
def main(only: str, rounds: int) -> None:
    """Print one line per model and file."""
    warnings.simplefilter("ignore")
    for model in REAL_MODELS:
        if not model.exports or not re.search(only, model.id):
            continue
        net = model.load()
        args, kwargs = model.inputs(*TIMED[model.id])
        recipes = ("exact", "int8-static") if model.id in _QUANTIZED else ("exact",)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            with torch.inference_mode(mode=False):
                sessions = [_file(model, net, r, Path(folder) / f"{r}.pt") for r in recipes]
            torch.set_num_threads(1)
            runs: list[Callable[[], Any]] = [partial(net, *args, **kwargs)]
            runs += [partial(s.run, _flat((args, kwargs))) for s in sessions]
            expected = _flat(runs[0]())
            fidelities = [measure(expected, _flat(run())) for run in runs]
            timings = interleave(runs, rounds=rounds)
        for name, timing, fidelity in zip(("eager", *recipes), timings, fidelities, strict=True):
            print(
                f"{model.id:20} {name:12} {timing.median_ms:8.2f} ms  {timing.ratio:5.2f}x "
                f"({timing.low:.2f}-{timing.high:.2f})  {fidelity.sqnr_db:6.1f} dB",
                flush=True,
            )


if __name__ == "__main__":
    main()
