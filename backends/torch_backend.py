"""What all files of plain torch have in common: lower, write aside, load, compare, move."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.base import (
    Artifact,
    Backend,
    Comparison,
    ExportOptions,
    KernelUse,
    RuntimeReport,
)
from planish.backends.kernels import quantized_operators
from planish.backends.onnx_file import publish, staged
from planish.backends.stepwise import is_quantized
from planish.backends.torch_lowering import Lowered, Lowering
from planish.backends.verify_artifact import SAMPLE, drift, probes_of
from planish.ir.compare import bounds_of, difference, measure, worst
from planish.ir.errors import ExportError, UnsupportedError, source_line
from planish.ir.execute import run
from planish.ir.ops import ASSERTIONS, is_pure_call, op_name
from planish.ir.program import Program
from planish.ir.tensortype import dim_text


class Session(Protocol):
    """A loaded file."""

    path: Path

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Run on flat inputs; flat outputs in order."""

    def operators(self) -> dict[str, int]:
        """Operator -> count."""

    def report(self) -> RuntimeReport:
        """What runs the file."""


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What is to be written.

    Attributes:
        lowered: the program in operators of torch.
        facts: what the file says of its own making.
        remark: takes a sentence for the report.
    """

    lowered: Lowered
    facts: Mapping[str, str]
    remark: Callable[[str], None]


class TorchBackend(Backend):
    """A target whose files plain torch loads."""

    exportable = False  # whether the lowered graph must be one that torch.export can hold

    @abstractmethod
    def _write(self, what: Writing, path: Path) -> None:
        """Write the file."""

    @abstractmethod
    def _open(self, path: Path, *, own: bool = False, threads: int | None = None) -> Session:
        """Load a file; ``own`` says that it was just written by this process."""

    def export(
        self, program: Program, path: str | Path, options: ExportOptions | None = None
    ) -> Artifact:
        """Lower, write aside, load and compare, move into place."""
        options = options or ExportOptions()
        self.target.check_opset(options.opset)
        goal = Path(path)
        if options.choices:
            raise ExportError(
                f"there is no lowering choice {min(options.choices)!r} for {self.target.name}",
                hint="leave the choices out of the recipe",
            )
        lowered = lower(program, exportable=self.exportable)
        facts = options.metadata({}) if callable(options.metadata) else options.metadata
        with staged(goal) as aside:
            self._write(Writing(lowered=lowered, facts=facts, remark=options.remark), aside)
            session = self._open(aside, own=True)
            operators = session.operators()
            _check_operators(operators)
            comparison = runtime = None
            if options.verify:
                comparison = verify(program, lowered, session, options)
                runtime = session.report()
            final = publish((aside,), goal)
        return Artifact(
            path=goal,
            target=self.target.name,
            files=final,
            bytes=sum(f.stat().st_size for f in final),
            opset=0,
            input_names=program.signature.tensor_names,
            output_names=output_names(program),
            choices={},
            operators=operators,
            comparison=comparison,
            runtime=runtime,
            kernels=lowered.kernels if options.verify else (),
        )

    def run(self, path: str | Path, inputs: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
        """Run a file on flat inputs."""
        outputs = self._open(Path(path)).run(inputs)
        return tuple(np.asarray(o) for o in outputs if o is not None)

    def opened(self, path: str | Path) -> Callable[[Sequence[Tensor]], object]:
        """A file loaded, to be run on one thread.

        torch's only setting is that of the process, so each run sets it and sets it back.
        """
        session = self._open(Path(path))

        def run_on_one(inputs: Sequence[Tensor]) -> object:
            before = torch.get_num_threads()
            if before == 1:
                return session.run(inputs)
            torch.set_num_threads(1)
            try:
                return session.run(inputs)
            finally:
                torch.set_num_threads(before)

        return run_on_one

    def read_back(self, path: str | Path) -> RuntimeReport:
        """Load a file and count its operators."""
        return self._open(Path(path)).report()


def lower(program: Program, *, exportable: bool = False) -> Lowered:
    """A program in oneDNN's kernels, with what each quantized operator became.

    Args:
        program: only read.
        exportable: whether the graph must be one that ``torch.export`` can hold.

    Raises:
        UnsupportedError: an operator has no form in plain torch.
    """
    from planish.backends.torch_int8 import TABLE

    lowering = Lowering(program, exportable=exportable)
    lowering.run(TABLE)
    uses = []
    for node in quantized_operators(program):
        name = op_name(node.target)
        kernel, reason = lowering.kernels.get(
            node, (None, f"torch has no integer kernel for {name}")
        )
        uses.append(
            KernelUse(
                node=node.name,
                operator=name,
                source=source_line(node),
                kernel=kernel,
                reason=reason,
            )
        )
    return lowering.finished(tuple(uses))


def verify(
    program: Program, lowered: Lowered, session: Session, options: ExportOptions
) -> Comparison:
    """Run the file on every sample and at a second set of sizes, beside the program.

    Raises:
        ExportError: it computes something else.
    """
    from planish.backends.torch_stepwise import stepwise

    probes = _probes(program, options.remark)
    quantized = is_quantized(program)
    steps = None
    if quantized:
        steps = stepwise(lowered, [(label, inputs) for label, inputs, _ in probes])
    names, found = program.signature.output_names, []
    for label, inputs, expected in probes:
        with seeded():
            outputs = session.run(inputs)
        known = options.quantization if label.startswith(SAMPLE) else None
        problem = (
            drift(expected, outputs, known)
            if quantized
            else difference(expected, outputs, names=names, bounds=bounds_of(program))
        )
        if problem:
            raise ExportError(
                f"the file does not compute what the program does: {problem}",
                where=f"{session.path.name}, {label}",
                hint="this is a defect of planish or of torch: report it with the model",
            )
        found.append(measure(expected, outputs))
    return Comparison(
        probes=tuple(label for label, _, _ in probes),
        fidelity=worst(found) or measure((), ()),
        stepwise=steps,
    )


def _probes(
    program: Program, remark: Callable[[str], None]
) -> list[tuple[str, Sequence[Any], Sequence[Any]]]:
    """As ``probes_of``; what a program draws at random is drawn from one seed."""
    drawn = [n for n in program.operators if not (is_pure_call(n) or n.target in ASSERTIONS)]
    if not drawn:
        return probes_of(program, remark)
    remark(
        f"{op_name(drawn[0].target)} draws from torch's generator in every call, as the model does"
    )
    probes: list[tuple[str, Sequence[Any], Sequence[Any]]] = []
    for label, inputs, _ in probes_of(program, remark):
        with seeded():
            probes.append((label, inputs, run(program, inputs)))
    return probes


@contextmanager
def seeded() -> Iterator[None]:
    """Torch's generator in one and the same state, and afterwards in its own again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def output_names(program: Program) -> tuple[str, ...]:
    """Names of the outputs that are computed."""
    pairs = zip(program.results, program.signature.output_names, strict=True)
    return tuple(name for value, name in pairs if isinstance(value, Node))


def _check_operators(operators: dict[str, int]) -> None:
    """Nothing of planish may remain: the file must load where it is not installed."""
    ours = [name for name in operators if name.startswith("planish::")]
    if ours:
        raise UnsupportedError(
            f"{ours[0]} was left in the file",
            hint="this is a defect of planish: report it with the model",
        )


def metadata(program: Program, facts: Mapping[str, str], **more: Any) -> str:  # noqa: ANN401
    """What the file says of itself; equal for equal programs and recipes."""
    own = {key.removeprefix("planish."): text for key, text in facts.items()}
    return json.dumps({**own, **description(program), **more}, sort_keys=True)


def description(program: Program) -> dict[str, Any]:
    """A program's flat inputs (name, dtype, sizes) and the names of its computed outputs."""
    signature = program.signature
    inputs = []
    for node, name in zip(program.placeholders, signature.tensor_names, strict=True):
        value = node.meta["val"]
        tensor = isinstance(value, Tensor)
        shape = [dim_text(d, signature.symbols) for d in value.shape] if tensor else []
        dtype = str(value.dtype).removeprefix("torch.") if tensor else type(value).__name__
        inputs.append({"name": name, "dtype": dtype, "shape": shape})
    return {"inputs": inputs, "outputs": list(output_names(program))}
