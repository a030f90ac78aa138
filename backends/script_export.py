"""The target ``torchscript``: a file that plain torch loads, in Python or C++, without planish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from planish.backends.base import Target
from planish.backends.torch_backend import TorchBackend, Writing, metadata
from planish.ir.program import Program

if TYPE_CHECKING:
    from planish.backends.script_run import ScriptSession


class TorchScript(TorchBackend):
    """TorchScript on a CPU, with oneDNN's kernels."""

    target: ClassVar[Target] = Target(
        name="torchscript",
        summary="a TorchScript file for plain torch in Python or C++, with integer kernels",
        suffix=".pt",
        opset=0,
        opsets=(0, 0),
        checks_sizes=True,
    )

    def _write(self, what: Writing, path: Path) -> None:
        from planish.backends.script_module import compile_module, write_module
        from planish.backends.script_source import source_of

        program = what.lowered.program
        source = source_of(what.lowered, what.remark)
        module: Any = compile_module(source)
        names = [a.name for a in module.forward.schema.arguments[1:]]
        _tell_renamed(program, names, what.remark)
        write_module(module, path, metadata(program, what.facts, call=source.call))

    def _open(self, path: Path, *, own: bool = False, threads: int | None = None) -> ScriptSession:
        from planish.backends.script_run import ScriptSession

        return ScriptSession(path, threads=threads)


def _tell_renamed(program: Program, names: list[str], remark: Callable[[str], None]) -> None:
    """Say which inputs must be called by another name: TorchScript keeps some for itself."""
    for name, given in zip(program.signature.parameters, names, strict=False):
        if name != given:
            remark(f"the argument {name!r} is called {given!r}: TorchScript has a use for its name")
