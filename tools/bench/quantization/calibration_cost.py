"""What calibrating costs: five kinds of ranges in one sweep, against two things.

    python -m planish.tools.bench.quantization.calibration_cost [--samples 512] [--rounds 1]

Time is compared with the entropy calibration of ``onnxruntime.quantization`` on the same samples,
memory with plain inference of the same program on the same batches. Each measurement is a fresh
process on one core. MiniLM computes its attention in single products here, because these are what
gets quantized; all sentences fill their length, so nobody has padding to leave out.

The other side is favored where there is a choice: it gets one batch at a time, since given all at
once it keeps every value of every batch.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from planish.ir.program import Program
from planish.passes.calibrate import Spool

LENGTH = 128
METHODS = ("minmax", "average", "percentile", "entropy", "mse")

Result = dict[str, float]


class Watch:
    """Wall and processor seconds since it was made; the second is steadier on a busy machine."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Result:
        """Both, so far."""
        return {
            "seconds": time.perf_counter() - self._began,
            "cpu_seconds": time.process_time() - self._cpu,
        }


def prepare(folder: Path, samples: int, batch: int) -> Result:
    """Write the samples and the plain float file that onnxruntime calibrates."""
    from planish.tools.bench.export_cost import export_plain
    from planish.tools.bench.real_inputs import minilm_tokenizer, text_of
    from planish.tools.bench.real_models import real_model

    tokenizer = minilm_tokenizer()
    rows = [tokenizer(text_of(tokenizer, LENGTH, i))["input_ids"][:LENGTH] for i in range(samples)]
    np.save(folder / "ids.npy", np.array(rows, dtype=np.int64))
    real = real_model("minilm")
    args, kwargs = real.inputs(*real.sizes[0])
    path = str(folder / "model.onnx")
    export_plain(_network(), args, kwargs, real.dynamic_shapes, path)
    return {"samples": len(rows), "batch": batch}


def run_inference(folder: Path, batch: int) -> Result:
    """All batches through the program, and nothing else."""
    from planish.ir.execute import run

    program, spooled = _program(folder, batch)
    watch = Watch()
    for inputs in spooled:
        run(program, inputs)
    times = watch.read()
    inputs = next(iter(spooled))
    return {**times, "live_mb": _live(lambda: run(program, inputs))}


def run_planish(folder: Path, batch: int) -> Result:
    """One sweep, and ranges by all methods of all values."""
    from planish.ir.quantscheme import QuantScheme
    from planish.passes.observe import observe

    program, spooled = _program(folder, batch)
    values = _values(program)
    scheme = QuantScheme(dtype="uint8", symmetric=False)
    watch = Watch()
    statistics = observe(program, values, spooled, padding_mask="attention_mask")
    swept = watch.read()
    for name in statistics:
        for method in METHODS:
            statistics.range(name, method, scheme)  # type: ignore[arg-type]  # a plain tuple
    times = watch.read()
    elements = sum(statistics.sketch(name).histogram.total for name in statistics)
    # The sketches do not grow, so two batches tell.
    few = _spool(program, _batches(folder, batch)[:2])
    live = _live(lambda: observe(program, values, few, padding_mask="attention_mask"))
    return {
        **times,
        "sweep_cpu_seconds": swept["cpu_seconds"],
        "live_mb": live,
        "values": len(statistics),
        "elements": elements,
    }


def run_onnxruntime(folder: Path, batch: int) -> Result:
    """Entropy calibration with the settings and operators of ``quantize_static``."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    class One(CalibrationDataReader):  # type: ignore[misc]  # the package is not typed
        def __init__(self, inputs: dict[str, np.ndarray]):
            self.left = [inputs]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    batches = [{k: v.numpy() for k, v in inputs.items()} for inputs in _batches(folder, batch)]
    watch = Watch()
    calibrator = create_calibrator(
        str(folder / "model.onnx"),
        sorted({*QLinearOpsRegistry, *QDQRegistry}),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Entropy,
    )
    for inputs in batches:
        calibrator.collect_data(One(inputs))
    found = calibrator.compute_data()
    return {**watch.read(), "values": len(found.data)}


SIDES: dict[str, Callable[[Path, int], Result]] = {
    "inference": run_inference,
    "planish": run_planish,
    "onnxruntime": run_onnxruntime,
}


def _network() -> torch.nn.Module:
    from planish.tools.bench.real_models import real_model

    network = real_model("minilm").load()
    network.set_attn_implementation("eager")  # type: ignore[operator]  # of transformers
    return network


def _program(folder: Path, batch: int) -> tuple[Program, Spool]:
    from planish.ir.capture import capture
    from planish.tools.bench.real_models import real_model

    real = real_model("minilm")
    args, kwargs = real.inputs(*real.sizes[0])
    program = capture(_network(), args, kwargs, dynamic_shapes=real.dynamic_shapes)
    return program, _spool(program, _batches(folder, batch))


def _spool(program: Program, batches: list[dict[str, Tensor]]) -> Spool:
    from planish.passes.calibrate import spool

    return spool(batches, program)


def _batches(folder: Path, batch: int) -> list[dict[str, Tensor]]:
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch)
    ]


def _values(program: Program) -> list[str]:
    """Every real value that is no other seen from a different side."""
    from planish.ir.ops import ALIAS_IN_EVAL, is_view

    return [
        node.name
        for node in program.operators
        if isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].dtype == torch.float32
        and node.target not in ALIAS_IN_EVAL
        and not is_view(node.target)
    ]


def _live(work: Callable[[], Any]) -> float:
    """The most MB of tensors that were alive at once."""
    from planish.tools.bench.live_bytes import LiveBytes

    with LiveBytes() as live:
        work()
    return float(live.peak / 2**20)


# -- the two kinds of process ---------------------------------------------------------------------


def child(side: str, folder: Path, samples: int, batch: int) -> None:
    """Measure one side in this process and print the result as the last line."""
    if side == "prepare":
        result = prepare(folder, samples, batch)
    else:
        if hasattr(os, "sched_setaffinity"):  # Linux only
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        result = SIDES[side](folder, batch)
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps(result))


def measured(side: str, folder: Path, samples: int, batch: int) -> Result:
    """One fresh process."""
    module = "planish.tools.bench.quantization.calibration_cost"
    code = f"import sys, pathlib; from {module} import child; "
    code += "child(sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, side, str(folder), str(samples), str(batch)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def lines(best: dict[str, Result]) -> Iterator[str]:
    """What was found, in sentences."""
    for side, result in best.items():
        figures = ", ".join(f"{key} {value:,.5g}" for key, value in result.items())
        yield f"{side}: {figures}"
    ours, plain, theirs = best["planish"], best["inference"], best["onnxruntime"]
    yield (
        f"time: five methods here / entropy alone there = {ours['seconds'] / theirs['seconds']:.2f}"
    )
    yield (
        f"processor time: five methods here / entropy alone there = "
        f"{ours['cpu_seconds'] / theirs['cpu_seconds']:.2f}"
    )
    yield f"time: over plain inference {ours['seconds'] / plain['seconds']:.2f}x"
    yield f"live tensors: over plain inference {ours['live_mb'] / plain['live_mb']:.3f}x"
    yield f"peak of the process: over plain inference {ours['peak_mb'] / plain['peak_mb']:.3f}x"
    yield (
        f"peak of the process: over onnxruntime's calibration "
        f"{ours['peak_mb'] / theirs['peak_mb']:.3f}x"
    )


@click.command()
@click.option("--samples", default=512, show_default=True, help="Sentences of 128 tokens.")
@click.option("--batch", default=16, show_default=True, help="Sentences in one batch.")
@click.option("--rounds", default=1, show_default=True, help="Processes per side; the best counts.")
@click.option("--output", type=click.Path(path_type=Path), help="Write all figures as JSON.")
def main(samples: int, batch: int, rounds: int, output: Path | None) -> None:
    """Measure and print figures and ratios."""
    found: dict[str, list[Result]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured("prepare", folder, samples, batch)
        for _ in range(rounds):
            for side in SIDES:
                found[side].append(measured(side, folder, samples, batch))
    best = {side: min(results, key=lambda r: r["seconds"]) for side, results in found.items()}
    for line in lines(best):
        print(line)
    if output is not None:
        output.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
