"""Run a file in ONNX Runtime, and read back the graph that the runtime made of it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from planish.backends.base import RuntimeReport
from planish.ir.errors import ExportError

if TYPE_CHECKING:
    import onnx
    import onnxruntime

_PROVIDERS = ("CPUExecutionProvider",)
# Above this the optimized graph is not written out: its weights would be copied to disk again.
_WRITE_LIMIT_BYTES = 2**30
_LOG_ERRORS = 3


class Session:
    """A file loaded in ONNX Runtime on the CPU.

    Args:
        path: the model.
        threads: for one operator; None for the runtime's default.
        read_back: keep what ``operators`` needs. Use the session as a context manager then.
        optimize: False leaves out all of the runtime's graph optimizations.

    Raises:
        ExportError: the runtime refuses the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        read_back: bool = False,
        optimize: bool = True,
    ):
        import onnxruntime

        self.path = path
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._profiled: Path | None = None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _LOG_ERRORS
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        if not optimize:
            level = onnxruntime.GraphOptimizationLevel
            options.graph_optimization_level = level.ORT_DISABLE_ALL
        if read_back:
            self._observe(options)
        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=list(_PROVIDERS)
            )
        except Exception as error:  # the runtime's exceptions have no common base of their own
            self.close()
            raise ExportError(
                f"ONNX Runtime refuses the file: {str(error).strip().splitlines()[0]}",
                hint="export with another --opset, or to the target 'onnx'",
            ) from error
        self.input_names = tuple(i.name for i in self.session.get_inputs())
        self.output_names = tuple(o.name for o in self.session.get_outputs())

    def _observe(self, options: onnxruntime.SessionOptions) -> None:
        """Have the optimized graph written, or for a large file the operators timed."""
        self._folder = tempfile.TemporaryDirectory(prefix="planish-")
        folder = Path(self._folder.name)
        if _size(self.path) > _WRITE_LIMIT_BYTES:
            options.enable_profiling = True
            options.profile_file_prefix = str(folder / "profile")
            return
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        prefix = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{prefix}file_name", "optimized.bin")
        options.add_session_config_entry(f"{prefix}min_size_in_bytes", "256")

    def run(self, inputs: Sequence[Any]) -> tuple[np.ndarray, ...]:
        """Run on flat inputs, one per input of the file."""
        feeds = {n: as_array(v) for n, v in zip(self.input_names, inputs, strict=True)}
        try:
            return tuple(self.session.run(None, feeds))
        except Exception as error:  # likewise
            raise ExportError(
                f"the file fails in ONNX Runtime: {str(error).strip().splitlines()[0]}",
                hint="this is a defect of planish or of the runtime: report it with the model",
            ) from error

    def report(self) -> RuntimeReport:
        """What the runtime made of the file; for a large file, of the runs so far."""
        import onnxruntime

        notes: tuple[str, ...] = ()
        graph = self.optimized()
        if graph is not None:
            counts = _graph_counts(graph)
        else:
            counts = self._profile_counts()
            notes = ("the operators are those that ran; the optimized graph was not written out",)
        return RuntimeReport(
            runtime=f"onnxruntime {onnxruntime.__version__}",
            providers=tuple(self.session.get_providers()),
            operators=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            notes=notes,
        )

    def optimized(self) -> onnx.ModelProto | None:
        """The graph that the runtime made of the file, without large constants.

        Returns:
            None for a file so large that the runtime was not made to write it out again.
        """
        import onnx

        if self._folder is None:
            raise ExportError("this session was not opened to be read back")
        written = Path(self._folder.name) / "optimized.onnx"
        return onnx.load(str(written), load_external_data=False) if written.exists() else None

    def _profile_counts(self) -> Counter[str]:
        if self._profiled is None:
            self._profiled = Path(self.session.end_profiling())
        events = json.loads(self._profiled.read_text())
        ran = {
            (event["name"], event["args"]["node_index"], event["args"]["op_name"])
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        }
        return Counter(operator for _, _, operator in ran)

    def close(self) -> None:
        """Remove what ``read_back`` left on disk."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_back(path: Path) -> RuntimeReport:
    """Load a file and say what the runtime made of it."""
    with Session(path, read_back=True) as session:
        return session.report()


def _graph_counts(model: onnx.ModelProto) -> Counter[str]:
    from planish.backends.onnx_build import count_operators

    return Counter(count_operators(model))


def _size(path: Path) -> int:
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def as_array(value: Any) -> np.ndarray:  # noqa: ANN401 - a tensor, or a number for a size
    """An input as the runtime takes it.

    Raises:
        ExportError: NumPy has no such dtype, so the runtime cannot be fed from Python.
    """
    if isinstance(value, Tensor):
        if value.dtype is torch.bfloat16:
            raise ExportError(
                "a bfloat16 input cannot be fed to ONNX Runtime from Python",
                hint="let the model take float32 and convert inside, or export with verify off",
            )
        return value.detach().cpu().numpy()
    return np.asarray(value)
