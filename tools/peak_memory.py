"""How much memory an artifact takes: loaded and run in a process of its own.

What counts is the growth over a process that has its runtime imported and nothing loaded yet.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from planish.tools.candidates import Values

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RUNS = 3


def peak_bytes(spec: str, inputs: Values, *, threads: int, trust_code: bool) -> int | None:
    """Peak growth of resident memory by loading an artifact and running it a few times.

    None where the system does not say (it is read from Linux's ``/proc``).

    Raises:
        RuntimeError: the process failed; carries its last line.
    """
    if not _RESET.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "inputs.npz"
        np.savez(held, *inputs.values())
        task = {
            "spec": spec,
            "inputs": str(held),
            "names": list(inputs),
            "threads": threads,
            "trust_code": trust_code,
        }
        command = [sys.executable, "-m", "planish.tools.peak_memory", json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return int(done.stdout.splitlines()[-1])


def _measure(task: dict[str, object]) -> int:
    """Load, run, and read the peak; in the process of its own."""
    import torch

    from planish.tools.candidates import open_candidate

    spec, threads = str(task["spec"]), int(str(task["threads"]))
    if spec.endswith(".onnx"):
        import onnxruntime  # noqa: F401 - so that its own size is not the artifact's
    torch.set_num_threads(threads)
    arrays = np.load(str(task["inputs"]))
    names = task["names"]
    assert isinstance(names, list)
    inputs = {name: arrays[f"arr_{i}"] for i, name in enumerate(names)}
    _RESET.write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    candidate = open_candidate(spec, threads=threads, trust_code=bool(task["trust_code"]))
    for _ in range(_RUNS):
        candidate.run(inputs)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A figure of this process, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{_STATUS} does not say {key}")


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
