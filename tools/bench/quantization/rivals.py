"""The rivals of the quantization table: ONNX Runtime's own quantizers, NNCF and OpenVINO.

ONNX Runtime's are a dependency already. NNCF and OpenVINO live in an environment of their own,
whose Python is named on the command line::

    python -m venv rivals && rivals/bin/pip install nncf openvino onnx

and are driven through ``rival_worker.py``, one process for all files, so that its runs can be
timed in alternation with ours.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planish.ir.errors import PlanishError, UsageError

Batches = Sequence[tuple[Tensor, ...]]


class RivalError(PlanishError):
    """A rival failed at what it was asked for; the table says so in its row."""


# -- ONNX Runtime ---------------------------------------------------------------------------------


class _Reader:
    """Calibration batches in the form that ONNX Runtime's quantizer reads."""

    def __init__(self, names: Sequence[str], batches: Batches):
        self._feeds: Iterator[dict[str, np.ndarray]] = (
            dict(zip(names, (t.numpy() for t in batch), strict=True)) for batch in batches
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by input name, None after the last."""
        return next(self._feeds, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._feeds)


def ort_static(plain: Path, goal: Path, batches: Batches) -> None:
    """``quantize_static`` as its documentation recommends for x86: QDQ, u8*s8, per channel.

    Raises:
        RivalError: it failed.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    _prepared(plain, goal)
    try:
        quantize_static(
            str(goal.with_suffix(".prepared.onnx")),
            str(goal),
            _Reader(input_names(plain), batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    except Exception as error:  # whatever it raises is the rival's result
        raise RivalError(f"quantize_static: {_first(error)}") from error


def ort_dynamic(plain: Path, goal: Path) -> None:
    """``quantize_dynamic`` with signed weights per channel.

    Raises:
        RivalError: it failed.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _prepared(plain, goal)
    try:
        quantize_dynamic(
            str(goal.with_suffix(".prepared.onnx")),
            str(goal),
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    except Exception as error:  # likewise
        raise RivalError(f"quantize_dynamic: {_first(error)}") from error


def _prepared(plain: Path, goal: Path) -> None:
    """The file after the quantizer's own shape inference and float optimizations.

    Where the preparation fails, as for some transformers, the plain file serves.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = goal.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    except Exception:  # the plain file is what its users are left with, too
        import onnx

        onnx.save(onnx.load(str(plain)), str(prepared))


def _first(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def input_names(path: Path) -> list[str]:
    """The inputs of an ONNX file, in order."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    return [i.name for i in graph.input if i.name not in stored]


# -- OpenVINO and NNCF ----------------------------------------------------------------------------


class Worker:
    """The process in the rivals' environment. A context manager.

    Args:
        python: of that environment.

    Raises:
        UsageError: it has no NNCF and OpenVINO.
    """

    def __init__(self, python: Path):
        script = Path(__file__).with_name("rival_worker.py")
        try:
            self._process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise UsageError(
                f"{python} cannot be started: {error.strerror}",
                hint="name the python of an environment with nncf and openvino",
            ) from error
        self._folder = tempfile.TemporaryDirectory(prefix="planish-rivals-")
        try:
            self.versions: Mapping[str, str] = self.ask(do="versions")
        except RivalError as error:
            self.close()
            raise UsageError(
                f"{python}: {error.what}", hint="pip install nncf openvino onnx, there"
            ) from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=30)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()

    def ask(self, **request: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever JSON holds
        """Have one request answered.

        Raises:
            RivalError: the rival failed, or its process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RivalError("the rivals' process has ended") from error
        line = self._process.stdout.readline()
        if not line:
            raise RivalError(f"the rivals' process ended at {request['do']!r}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RivalError(str(found["error"]))
        return found

    def make(self, method: str, source: Path, goal: Path, batches: Batches, kind: bool) -> None:
        """Have NNCF quantize a file; ``kind`` says that it is a transformer."""
        data = self._kept("calibration", batches)
        self.ask(
            do="make", method=method, source=str(source), goal=str(goal), data=data,
            transformer=kind,
        )  # fmt: skip

    def open(self, name: str, path: Path, timed: tuple[Tensor, ...]) -> None:
        """Load a file in OpenVINO."""
        self.ask(do="open", name=name, path=str(path), timed=self._kept("timed", [timed]))

    def seconds(self, name: str) -> float:
        """One timed run."""
        return float(self.ask(do="time", name=name)["seconds"])

    def outputs(self, name: str, batches: Batches) -> list[Tensor]:
        """The first output of every batch."""
        goal = Path(self._folder.name) / "outputs.npz"
        self.ask(do="run", name=name, data=self._kept("held", batches), goal=str(goal))
        with np.load(goal) as file:
            return [torch.from_numpy(file[str(i)]) for i in range(len(batches))]

    def _kept(self, name: str, batches: Batches) -> str:
        path = Path(self._folder.name) / f"{name}.npz"
        arrays = {
            f"{number}_{position}": tensor.numpy()
            for number, batch in enumerate(batches)
            for position, tensor in enumerate(batch)
        }
        np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy declares its own options here
        return str(path)
