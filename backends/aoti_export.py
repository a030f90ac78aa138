"""The target ``aotinductor``: machine code that AOTInductor makes of a program, in a ``.pt2`` file.

torch's compiler fuses what lies between the kernels; weights are packed while it compiles. The
package is loaded with ``torch._inductor.aoti_load_package`` or, in C++, ``AOTIModelPackageLoader``.
It runs on processors with the instruction set of the one that compiled it.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from planish.backends.base import Target
from planish.backends.script_module import METADATA
from planish.backends.torch_backend import TorchBackend, Writing, metadata
from planish.ir.errors import UnsupportedError
from planish.ir.ops import ASSERTIONS, is_pure_call, op_name
from planish.ir.program import Program

if TYPE_CHECKING:
    from planish.backends.aoti_run import CompiledSession


class AotInductor(TorchBackend):
    """Machine code made by torch's own compiler."""

    target: ClassVar[Target] = Target(
        name="aotinductor",
        summary="a .pt2 package of machine code for this kind of processor, made by AOTInductor",
        suffix=".pt2",
        opset=0,
        opsets=(0, 0),
    )
    exportable = True

    def _write(self, what: Writing, path: Path) -> None:
        from torch._inductor import aoti_compile_and_package

        from planish.backends.pt2_program import exported_program

        _check_compiler()
        program = what.lowered.program
        _check_program(program)
        numbers = _numbers(program)
        for name in numbers.values():
            what.remark(f"the output {name!r} is a number; the package gives it as a tensor")
        exported = exported_program(what.lowered, what.remark)
        settings: dict[str, Any] = {
            "freezing": True,  # weights in the layout of the kernels
            "cpp.dynamic_threads": True,  # as many as the process that loads it has
            "compile_threads": 1,
            "aot_inductor.metadata": {
                METADATA: metadata(program, what.facts, numbers=sorted(numbers))
            },
        }
        with _quiet(), _packing_has_types(), _fresh_cache(), torch.no_grad():
            try:
                aoti_compile_and_package(
                    exported, package_path=str(path), inductor_configs=settings
                )
            except Exception as error:  # whatever torch's compiler, or the one for C++, raises
                raise UnsupportedError(
                    f"AOTInductor cannot compile this program: {_reason(error)}",
                    hint="export to another target: *.onnx, *.pt, or *.pt2 for torch-export",
                ) from error
        what.remark("the package holds machine code for the instruction set of this processor")

    def _open(
        self, path: Path, *, own: bool = False, threads: int | None = None
    ) -> CompiledSession:
        from planish.backends.aoti_run import CompiledSession

        return CompiledSession(path, threads=threads)


def _check_compiler() -> None:
    from torch._inductor import config

    wanted: Any = config.cpp.cxx  # a name, or several to try in turn
    names = wanted if isinstance(wanted, (list, tuple)) else (wanted,)
    if not any(name and shutil.which(name) for name in names):
        raise UnsupportedError(
            "AOTInductor needs a C++ compiler, and there is none",
            hint="install g++ or clang, or name one in the environment variable CXX",
        )


def _numbers(program: Program) -> dict[int, str]:
    """Positions of the flat outputs that are computed numbers, and their names."""
    named = zip(program.results, program.signature.output_names, strict=True)
    return {
        position: name
        for position, (value, name) in enumerate(named)
        if isinstance(value, Node) and not isinstance(value.meta["val"], Tensor)
    }


def _check_program(program: Program) -> None:
    """Refuse what a package cannot hold, by name."""
    for node in program.operators:
        if not (is_pure_call(node) or node.target in ASSERTIONS):
            raise UnsupportedError(
                f"{op_name(node.target)} draws random numbers, and AOTInductor has a generator of "
                "its own, which cannot be compared with the model's",
                where=node,
                hint="export to *.pt, or to *.pt2 for torch-export",
            )
    for node, name in zip(program.placeholders, program.signature.tensor_names, strict=True):
        if not isinstance(node.meta["val"], Tensor):
            raise UnsupportedError(
                f"the input {name!r} is a number, and AOTInductor passes tensors only",
                hint="export to another target: *.onnx, *.pt, or *.pt2 for torch-export",
            )


def _reason(error: Exception) -> str:
    """The first line that says something."""
    return next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)


@contextmanager
def _packing_has_types() -> Iterator[None]:
    """Teach torch the type of a packed convolution weight, which it does not derive by itself."""
    library = torch.library.Library("onednn", "IMPL", "Meta")
    library.impl("qconv_prepack", lambda weight, *rest: torch.empty_like(weight))
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def _fresh_cache() -> Iterator[None]:
    """Compile in a folder of our own, which is removed: nothing old is taken, nothing is left."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's remarks on itself."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.")
            yield
    finally:
        logger.setLevel(level)
