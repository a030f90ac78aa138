"""A program as a PyTorch module that can be read, run and captured again.

``module.py`` imports torch only: a class with the constants as buffers, ``forward`` with one line
per operator, and ``build()``, which returns the module, example inputs and dynamic shapes, as every
command takes them (``planish bisect module:build``). Tensors too large to be written out lie in
``constants.safetensors`` beside it. Names are made anew, and no text of the program stands in the
source as it is: see ``module_literals``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import sympy
from torch import SymInt, Tensor
from torch.fx import Node

from planish.ir.archive import tensors_writer
from planish.ir.errors import ExportError, UnsupportedError, source_line
from planish.ir.program import Program
from planish.ir.tensortype import type_text
from planish.passes.debug.module_literals import (
    LOAD,
    PATTERN,
    call,
    comment,
    identifier,
    literal,
    restrided,
    tensor,
)
from planish.passes.debug.module_operators import operators_source

MODULE = "module.py"
CONSTANTS = "constants.safetensors"


def write_module(program: Program, folder: Path) -> Path:
    """Write ``module.py``, and ``constants.safetensors`` where it needs one.

    Args:
        program: any program; what it takes and returns is flat in the module.
        folder: exists; files of these names in it are replaced.

    Returns:
        The path of ``module.py``.

    Raises:
        UnsupportedError: the program calls what torch alone cannot name (operators of other
            libraries, branches), or takes numbers. Nothing is written.
        ExportError: a file cannot be written.
    """
    source, stored = module_source(program)
    path = folder / MODULE
    if stored:
        stream = io.BytesIO()
        tensors_writer(stored)(stream)
        _write(folder / CONSTANTS, stream.getvalue())
    else:
        (folder / CONSTANTS).unlink(missing_ok=True)
    _write(path, source.encode())
    return path


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or error}",
            hint="check that the folder exists, is writable and has room",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def module_source(program: Program) -> tuple[str, Mapping[str, Tensor]]:
    """The source of ``module.py``, and the tensors it expects in the file beside it.

    Raises:
        UnsupportedError: see ``write_module``.
    """
    return _Source(program).text()


class _Source:
    """What the parts of the file share: the names, and the tensors to store."""

    def __init__(self, program: Program):
        self.program = program
        self.stored: dict[str, Tensor] = {}
        self.names: dict[Node, str] = {}
        self.attributes: dict[str, str] = {}
        taken = {"pattern", "load", "DTYPES"}
        for node in program.placeholders:
            if not isinstance(node.meta.get("val"), Tensor):
                raise UnsupportedError(
                    f"the input {node.name!r} is a number, which a captured module cannot take",
                    hint="the reduced program.pt2 takes it",
                )
            self.names[node] = identifier(node.name, taken)
        for node in program.operators:
            self.names[node] = identifier(node.name, taken)
        attributes: set[str] = set()
        for name, value in program.constants.items():
            if not isinstance(value, Tensor):
                raise UnsupportedError(
                    f"the program holds a branch ({name!r}), which has no plain source",
                    hint="the reduced program.pt2 holds it; look at it with `planish show`",
                )
            self.attributes[name] = identifier(name, attributes)
        for node in program.graph.find_nodes(op="get_attr"):
            self.names[node] = f"self.{self.attributes[str(node.target)]}"

    def text(self) -> tuple[str, Mapping[str, Tensor]]:
        """The file, and what it stores."""
        parts = [self.model(), self.build()]
        body = "\n\n".join(parts)
        helpers = PATTERN if "pattern(" in body else ""
        own = operators_source(node.target for node in self.program.operators)
        helpers += own
        imports = ["import torch", f"from torch import {'Tensor, ' if own else ''}nn"]
        if "Dim(" in body or "Dim.AUTO" in body:
            imports.append("from torch.export import Dim")
        plain = [f"import {m}" for m in ("math", "operator") if f" {m}." in body]
        if self.stored:
            plain += ["import json", "from pathlib import Path"]
            dtypes = "\n".join(
                f'    "{name}": "{str(t.dtype).removeprefix("torch.")}",'
                for name, t in self.stored.items()
            )
            helpers += f"\n\nDTYPES = {{\n{dtypes}\n}}\n{LOAD.removeprefix(chr(10))}"
        count = len(self.program.operators)
        what = f"{count} operator{'s' if count != 1 else ''}, as reduced by planish"
        head = f'"""{what}; build() returns the module and its inputs."""\n\n'
        top = "\n".join([*sorted(plain), *([""] if plain else []), *imports])
        return f"{head}{top}\n{helpers}\n\n{body}", self.stored

    def expression(self, name: str, value: Tensor) -> str:
        """A tensor as source: written out, or read from the file under ``name``."""
        if value.device.type != "cpu":
            raise UnsupportedError(f"a tensor on {value.device} has no plain source")
        text = tensor(value)
        if text is None:
            self.stored[name] = value
            text = f'stored["{name}"]'
        return restrided(text, value)

    def model(self) -> str:
        """The class."""
        buffers = [
            f'        self.register_buffer("{a}", {self.expression(a, value)})'
            for a, value in ((self.attributes[n], v) for n, v in self._tensors())
        ]
        needs = any('stored["' in line for line in buffers)
        inputs = ", ".join(["self", *(self.names[n] for n in self.program.placeholders)])
        results = [literal(r, self.names) for r in self.program.results]
        returned = f"({results[0]},)" if len(results) == 1 else f"({', '.join(results)})"
        return "\n".join(
            [
                "class Reduced(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(["        stored = load()"] if needs else []),
                *buffers,
                "",
                f"    def forward({inputs}):",
                *self.lines(),
                f"        return {returned}",
                "",
            ]
        )

    def _tensors(self) -> list[tuple[str, Tensor]]:
        constants = self.program.constants.items()
        return [(n, v) for n, v in constants if isinstance(v, Tensor)]

    def lines(self) -> list[str]:
        """One line per operator, below the user's line it comes from."""
        symbols = self.program.signature.symbols
        lines: list[str] = []
        last: str | None = None
        for node in self.program.operators:
            source = source_line(node)
            if source is not None and source != last:
                lines.append(f"        {comment(source)}")
            last = source
            kind = comment(type_text(node.meta.get("val"), symbols))
            lines.append(f"        {self.names[node]} = {call(node, self.names)}  {kind}")
        return lines

    def build(self) -> str:
        """The function that gives the module, the example inputs and the dynamic shapes."""
        program = self.program
        sample = program.samples[0] if program.samples else ()
        taken: set[str] = {"pattern", "load"}
        keys = [identifier(f"example_{self.names[n]}", taken) for n in program.placeholders]
        before = set(self.stored)
        inputs = [
            f"        {self.expression(key, value)},"
            for key, value in zip(keys, sample, strict=False)
        ]
        dims, shapes = self.dynamic(taken)
        lines = ["def build():", '    """The module, example inputs, and dynamic shapes."""']
        if set(self.stored) - before:
            lines.append("    stored = load()")
        lines += [*dims, "    inputs = (", *inputs, "    )"]
        lines.append(f"    return Reduced().eval(), inputs, {shapes}")
        return "\n".join([*lines, ""])

    def dynamic(self, taken: set[str]) -> tuple[list[str], str]:
        """Lines that make the dimensions, and the expression that says which input has which."""
        signature = self.program.signature
        dims: dict[str, str] = {}
        lines: list[str] = []
        rows: list[str] = []
        for node in self.program.placeholders:
            row = []
            for axis, size in enumerate(node.meta["val"].shape):
                if not isinstance(size, SymInt) or size.node.expr.is_Integer:
                    continue
                for symbol in sorted(map(str, size.node.expr.free_symbols)):
                    if symbol not in dims:
                        name = identifier(signature.symbols.get(symbol, symbol), taken)
                        dims[symbol] = name
                        low, high = signature.ranges.get(symbol, (0, None))
                        limits = f", min={low}" + (f", max={high}" if high is not None else "")
                        lines.append(f'    {name} = Dim("{name}"{limits})')
                row.append(f"{axis}: {_size_text(size.node.expr, dims)}")
            rows.append("{" + ", ".join(row) + "}")
        if not dims:
            return [], "None"
        return lines, "(" + "".join(f"{row}, " for row in rows).rstrip() + ")"


def _size_text(expr: sympy.Expr, dims: Mapping[str, str]) -> str:
    """A size over dimensions; what torch cannot declare is left to it to find out."""
    symbols = list(expr.free_symbols)
    if len(symbols) == 1 and expr.is_polynomial(*symbols):
        terms = sympy.Poly(expr, symbols[0]).all_coeffs()
        if len(terms) == 2 and all(t.is_Integer for t in terms) and terms[0] > 0:
            factor, offset = int(terms[0]), int(terms[1])
            text = dims[str(symbols[0])] if factor == 1 else f"{factor} * {dims[str(symbols[0])]}"
            return f"{text} + {offset}" if offset > 0 else f"{text} - {-offset}" if offset else text
    return "Dim.AUTO"
