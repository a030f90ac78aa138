"""What the sweep does with one architecture, stage by stage. Runs in a process of its own.

capture     the model becomes a program
exact       the ``exact`` recipe, every pass verified and compared
onnx        export to the portable ONNX target, which compares the file with the program
equal       the file in ONNX Runtime against the model itself, on the sample and a second probe
torchscript the TorchScript file, which export compares with the program on both; a column of its
            own: what fails there is told in the facts and does not fail the entry
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import planish
from planish.backends.base import Artifact
from planish.ir.capture import capture
from planish.ir.compare import bounds_of, difference
from planish.ir.errors import PlanishError
from planish.ir.probe import second_reference
from planish.ir.program import Program
from planish.optimized import Optimized
from planish.tools.bench.zoo import ZooEntry


class Status(StrEnum):
    """How an entry ended: all stages, a deliberate error of planish, or anything else."""

    PASS = "pass"
    ERROR = "error"
    BUG = "BUG"


class DisagreementError(Exception):
    """The exported file does not compute what the model does: always a bug."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the results.

    Attributes:
        name: of the entry.
        family: of the entry.
        status: see ``Status``.
        stage: the stage that failed, or the empty string.
        kind: class name of the error, or the empty string.
        message: of the error.
        seconds: wall time of each stage that ran, and ``build``.
        facts: operators before and after, rewrites, bytes of the file, second probe.
    """

    name: str
    family: str
    status: Status
    stage: str = ""
    kind: str = ""
    message: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Outcome":
        """Read what ``to_json`` wrote."""
        values = json.loads(line)
        return cls(**{**values, "status": Status(values["status"])})


@dataclass
class Case:
    """An entry on its way through the stages; each stage fills in what the next one needs."""

    entry: ZooEntry
    model: nn.Module
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    program: Program | None = None
    optimized: Optimized | None = None
    artifact: Artifact | None = None


@dataclass(frozen=True)
class Stage:
    """A named step; a later column of the sweep is one more of these."""

    name: str
    run: Callable[[Case], None]


def _capture(case: Case) -> None:
    args, kwargs = case.entry.inputs()
    shapes = case.entry.dynamic_shapes
    case.program = capture(case.model, args, kwargs, dynamic_shapes=shapes)
    case.facts["operators"] = len(case.program.operators)


def _exact(case: Case) -> None:
    assert case.program is not None
    case.optimized = planish.optimize(case.program, recipe="exact", target="onnx", verify="each")
    case.facts["operators_after"] = len(case.optimized.program.operators)
    case.facts["changes"] = case.optimized.report.changes


def _onnx(case: Case) -> None:
    assert case.optimized is not None
    case.artifact = case.optimized.export(case.folder / "model.onnx")
    case.facts["bytes"] = case.artifact.bytes


def _equal(case: Case) -> None:
    assert case.program is not None
    assert case.artifact is not None
    args, kwargs = case.entry.inputs()
    _compare(case, "the sample", case.program.signature.flatten(args, kwargs))
    probe = second_reference(case.program)
    case.facts["second_probe"] = dict(probe.sizes or {}) if probe.resized else "other values"
    if probe.inputs is None:
        case.facts["second_probe"] = None
        return
    _compare(case, "the second probe", probe.inputs)


def _torchscript(case: Case) -> None:
    assert case.optimized is not None
    try:
        case.optimized.export(case.folder / "model.pt", target="torchscript")
        case.facts["torchscript"] = "pass"
    except Exception as error:  # the sweep is there to see every kind of failure
        traceback.print_exc()
        case.facts["torchscript"] = f"{type(error).__name__}: {error}"[:2000]


def _compare(case: Case, where: str, flat: tuple[Any, ...]) -> None:
    """Raise DisagreementError unless the file and the model itself give equal outputs."""
    import onnxruntime as ort

    assert case.program is not None
    assert case.artifact is not None
    signature = case.program.signature
    values = iter(flat)
    leaves = [
        signature.fixed[i] if i in signature.fixed else next(values)
        for i in range(signature.in_spec.num_leaves)
    ]
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    with torch.no_grad():
        outputs = pytree.tree_leaves(case.model(*args, **kwargs))
    reference = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
    bounds = [
        bound
        for leaf, bound in zip(outputs, bounds_of(case.program), strict=True)
        if isinstance(leaf, Tensor)
    ]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        str(case.artifact.path), options, providers=["CPUExecutionProvider"]
    )
    # The runtime drops inputs that the graph does not use.
    taken = {value.name for value in session.get_inputs()}
    named = zip(case.artifact.input_names, flat, strict=True)
    feed = {name: torch.as_tensor(value).numpy() for name, value in named if name in taken}
    found = [torch.from_numpy(a) for a in session.run(list(case.artifact.output_names), feed)]
    problem = difference(reference, found, names=case.artifact.output_names, bounds=bounds)
    if problem:
        raise DisagreementError(f"ONNX Runtime against the model on {where}: {problem}")


STAGES: tuple[Stage, ...] = (
    Stage("capture", _capture),
    Stage("exact", _exact),
    Stage("onnx", _onnx),
    Stage("equal", _equal),
    Stage("torchscript", _torchscript),
)


def sweep_one(entry: ZooEntry, stages: tuple[Stage, ...] = STAGES) -> Outcome:
    """Take one entry through the stages, in this process."""
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = {}
    stage_name = "build"
    try:
        with tempfile.TemporaryDirectory(prefix="planish-sweep-") as folder:
            with _timed(seconds, "build"):
                case = Case(entry, entry.build(), Path(folder), facts)
            for stage in stages:
                stage_name = stage.name
                with _timed(seconds, stage.name):
                    stage.run(case)
    except Exception as error:  # the sweep is there to see every kind of failure
        traceback.print_exc()
        named = isinstance(error, PlanishError)
        return Outcome(
            name=entry.name,
            family=entry.family,
            status=Status.ERROR if named else Status.BUG,
            stage=stage_name,
            kind=type(error).__name__,
            message=str(error)[:2000],
            seconds=seconds,
            facts=facts,
        )
    return Outcome(
        name=entry.name, family=entry.family, status=Status.PASS, seconds=seconds, facts=facts
    )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(time.perf_counter() - start, 3)


def child(name: str, result: str, log: str, memory_bytes: int, timeout_seconds: int) -> None:
    """Entry point of the process for one entry: writes the outcome's JSON to ``result``.

    Everything printed goes to ``log``. The address space is bounded, and an alarm ends the process
    if the parent did not.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.alarm(timeout_seconds + 10)
    torch.set_num_threads(1)
    from planish.tools.bench.zoo import entry

    outcome = sweep_one(entry(name))
    sys.stdout.flush()
    scratch = Path(result + ".part")
    scratch.write_text(outcome.to_json(), encoding="utf-8")
    scratch.rename(result)
