"""Runs in the rivals' own environment: NNCF writes files, OpenVINO runs them.

This file imports nothing of planish: it is started by path with another Python. Requests are lines
of JSON on standard input, answers lines of JSON on standard output; arrays travel in ``.npz``
files. What the libraries print goes to standard error.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np


def versions() -> dict[str, str]:
    """What is installed here."""
    import nncf
    import openvino

    return {"nncf": nncf.__version__, "openvino": openvino.__version__.split("-")[0]}


def make(method: str, source: str, goal: str, data: str, transformer: bool) -> dict[str, float]:
    """Quantize ``source``, an ONNX file, and write ``goal``, an OpenVINO ``.xml``."""
    import nncf
    import openvino

    began = time.perf_counter()
    model = openvino.Core().read_model(source)
    if method == "int8":
        batches = _batches(data)
        kind = nncf.ModelType.TRANSFORMER if transformer else None
        model = nncf.quantize(
            model, nncf.Dataset(batches), model_type=kind, subset_size=len(batches)
        )
    else:
        modes = {
            "weights8": nncf.CompressWeightsMode.INT8_ASYM,
            "weights4": nncf.CompressWeightsMode.INT4_SYM,
        }
        model = nncf.compress_weights(model, mode=modes[method])
    openvino.save_model(model, goal, compress_to_fp16=False)
    return {"seconds": time.perf_counter() - began}


def _batches(data: str) -> list[list[np.ndarray]]:
    with np.load(data) as file:
        found: dict[int, dict[int, np.ndarray]] = {}
        for name in file.files:
            batch, position = name.split("_")
            found.setdefault(int(batch), {})[int(position)] = file[name]
    return [[parts[i] for i in sorted(parts)] for _, parts in sorted(found.items())]


class Runner:
    """A file in OpenVINO: float32 where it is not quantized, one thread, one stream."""

    def __init__(self, path: str) -> None:
        import openvino

        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled = openvino.Core().compile_model(path, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.timed: list[np.ndarray] = []

    def run(self, inputs: list[np.ndarray]) -> np.ndarray:
        """The first output."""
        self.request.infer(inputs)
        return np.array(self.request.get_output_tensor(0).data)


def answer(request: dict[str, Any], runners: dict[str, Runner]) -> dict[str, Any]:
    """Do what one request asks for."""
    what = request["do"]
    if what == "versions":
        return versions()
    if what == "make":
        return make(*(request[k] for k in ("method", "source", "goal", "data", "transformer")))
    if what == "open":
        runner = runners[request["name"]] = Runner(request["path"])
        runner.timed = _batches(request["timed"])[0]
        return {}
    runner = runners[request["name"]]
    if what == "time":
        began = time.perf_counter()
        runner.request.infer(runner.timed)
        return {"seconds": time.perf_counter() - began}
    outputs = {str(i): runner.run(batch) for i, batch in enumerate(_batches(request["data"]))}
    np.savez(request["goal"], **outputs)  # type: ignore[arg-type]  # numpy has options there
    return {}


def main() -> None:
    """Answer until standard input ends."""
    # Libraries print to standard output; the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runners: dict[str, Runner] = {}
    for line in sys.stdin:
        try:
            found = answer(json.loads(line), runners)
        except Exception as error:  # whatever a library raises is the rival's result
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
