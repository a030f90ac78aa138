"""The target ``torchscript``: a file that plain torch loads, in Python or C++, without planish."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
    Target,
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

if TYPE_CHECKING:
    from planish.backends.script_run import ScriptSession


class TorchScript(Backend):
    """TorchScript on a CPU, with oneDNN's kernels."""

    target: ClassVar[Target] = Target(
        name="torchscript",
        summary="a TorchScript file for plain torch in Python or C++, with integer kernels",
        suffix=".pt",
        opset=0,
        opsets=(0, 0),
    )

    def export(
        self, program: Program, path: str | Path, options: ExportOptions | None = None
    ) -> Artifact:
        """Lower, compile, write aside, load and compare, move into place."""
        from planish.backends.script_module import compile_module, write_module
        from planish.backends.script_run import ScriptSession
        from planish.backends.script_source import source_of

        options = options or ExportOptions()
        self.target.check_opset(options.opset)
        goal = Path(path)
        if options.choices:
            raise ExportError(
                f"there is no lowering choice {min(options.choices)!r} for torchscript",
                hint="leave the choices out of the recipe",
            )
        lowered = lower(program)
        source = source_of(lowered, options.remark)
        facts = options.metadata({}) if callable(options.metadata) else dict(options.metadata)
        with staged(goal) as aside:
            metadata = _metadata(program, dict(facts), source.call)
            write_module(compile_module(source), aside, metadata)
            session = ScriptSession(aside)
            _tell_renamed(program, session, options.remark)
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
            output_names=_output_names(program),
            choices={},
            operators=operators,
            comparison=comparison,
            runtime=runtime,
            kernels=lowered.kernels if options.verify else (),
        )

    def run(self, path: str | Path, inputs: Sequence[Tensor]) -> tuple[np.ndarray, ...]:
        """Run a file on flat inputs."""
        from planish.backends.script_run import ScriptSession

        outputs = ScriptSession(Path(path)).run(inputs)
        return tuple(np.asarray(o) for o in outputs if o is not None)

    def opened(self, path: str | Path) -> Callable[[Sequence[Tensor]], object]:
        """A file loaded on one thread: torch's only setting is that of the process."""
        from planish.backends.script_run import ScriptSession

        return ScriptSession(Path(path), threads=1).run

    def read_back(self, path: str | Path) -> RuntimeReport:
        """Load a file and count its operators."""
        from planish.backends.script_run import ScriptSession

        return ScriptSession(Path(path)).report()


def lower(program: Program) -> Lowered:
    """A program in oneDNN's kernels, with what each quantized operator became.

    Raises:
        UnsupportedError: an operator has no form in plain torch.
    """
    from planish.backends.torch_int8 import TABLE

    lowering = Lowering(program)
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
    program: Program, lowered: Lowered, session: ScriptSession, options: ExportOptions
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
    probes = []
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


def _output_names(program: Program) -> tuple[str, ...]:
    pairs = zip(program.results, program.signature.output_names, strict=True)
    return tuple(name for value, name in pairs if isinstance(value, Node))


def _tell_renamed(program: Program, session: ScriptSession, remark: Callable[[str], None]) -> None:
    """Say which inputs must be called by another name: TorchScript keeps some for itself."""
    for name, given in zip(program.signature.parameters, session.parameters, strict=False):
        if name != given:
            remark(f"the argument {name!r} is called {given!r}: TorchScript has a use for its name")


def _check_operators(operators: dict[str, int]) -> None:
    """Nothing of planish may remain: the file must load where it is not installed."""
    ours = [name for name in operators if name.startswith("planish::")]
    if ours:
        raise UnsupportedError(
            f"{ours[0]} was left in the file",
            hint="this is a defect of planish: report it with the model",
        )


def _metadata(program: Program, facts: dict[str, str], call: dict[str, Any]) -> str:
    """What the file says of itself; equal for equal programs and recipes."""
    signature = program.signature
    inputs = []
    for node, name in zip(program.placeholders, signature.tensor_names, strict=True):
        value = node.meta["val"]
        tensor = isinstance(value, Tensor)
        shape = [dim_text(d, signature.symbols) for d in value.shape] if tensor else []
        dtype = str(value.dtype).removeprefix("torch.") if tensor else type(value).__name__
        inputs.append({"name": name, "dtype": dtype, "shape": shape})
    return json.dumps(
        {
            **{key.removeprefix("planish."): text for key, text in facts.items()},
            "inputs": inputs,
            "outputs": list(_output_names(program)),
            "call": call,
        },
        sort_keys=True,
    )
