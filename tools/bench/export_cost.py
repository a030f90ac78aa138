"""What optimizing costs: planish against ``torch.onnx.export`` alone, in time and peak memory.

    python -m planish.tools.bench.export_cost [--model minilm] [--rounds 3]

Each measurement is a fresh process. It first exports a one-layer model the same way, so that
imports are paid on both sides, then times the real one. The sides alternate, and the medians of
the ratios within a round are compared. On a busy machine the processor time with
``OMP_NUM_THREADS=1`` is the steadier figure.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from torch import nn

_SIDES = ("plain", "planish")

_CHILD = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import torch
from planish.tools.bench.export_cost import export_plain, export_planish
from planish.tools.bench.real_models import real_model
side, name, folder = sys.argv[1:4]
export = {"plain": export_plain, "planish": export_planish}[side]
tiny = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).eval()
export(tiny, (torch.randn(2, 4),), {}, None, folder + "/tiny.onnx")
real = real_model(name)
model = real.load()
args, kwargs = real.inputs(*real.sizes[0])
start, cpu = time.perf_counter(), time.process_time()
stages = export(model, args, kwargs, real.dynamic_shapes, folder + "/real.onnx")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
cpu = time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak, "stages": stages}))
"""


def export_plain(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,  # noqa: ANN401 - as torch.export takes it
    path: str,
) -> dict[str, float]:
    """``torch.onnx.export`` as anybody calls it."""
    import torch

    torch.onnx.export(
        model,
        args,
        path,
        kwargs=dict(kwargs),
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    return {}


def export_planish(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,  # noqa: ANN401 - as torch.export takes it
    path: str,
) -> dict[str, float]:
    """Capture, the exact recipe with verification, and a verified file."""
    import planish

    result = planish.optimize(model, (tuple(args), dict(kwargs)), dynamic_shapes=dynamic_shapes)
    result.export(path)
    return dict(result.report.seconds)


def measure_once(side: str, model: str) -> dict[str, object]:
    """One fresh process; seconds, peak MB and the stages it named."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, side, model, folder],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@click.command()
@click.option("--model", default="minilm", show_default=True, help="A name of real_models.")
@click.option("--rounds", default=3, show_default=True, help="Processes per side.")
@click.option("--output", type=click.Path(path_type=Path), help="Write all figures as JSON.")
def main(model: str, rounds: int, output: Path | None) -> None:
    """Measure and print the medians and the ratios."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in _SIDES}
    for number in range(rounds):
        for side in _SIDES if number % 2 == 0 else reversed(_SIDES):
            result = measure_once(side, model)
            results[side].append(result)  # type: ignore[arg-type]
            print(
                f"{side:8} {result['seconds']:6.2f} s  {result['peak_mb']:7.0f} MB  "
                f"{result['stages']}"
            )
    for key, unit in (("seconds", "s"), ("cpu_seconds", "s"), ("peak_mb", "MB")):
        medians = {s: statistics.median(r[key] for r in results[s]) for s in _SIDES}
        ratios = [b[key] / a[key] for a, b in zip(*results.values(), strict=True)]
        print(
            f"{key}: plain {medians['plain']:.2f} {unit}, planish {medians['planish']:.2f} {unit}, "
            f"median ratio {statistics.median(ratios):.2f}x"
        )
    if output is not None:
        output.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
