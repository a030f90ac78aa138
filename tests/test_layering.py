"""Imports point one way, and `import planish` brings in no heavy library.

ir <- passes <- backends <- planish (the face) <- tools
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.repository import FOLDERS, ROOT, name_of, python_files, tree

ORDER = tuple(FOLDERS)

# Slow to import, or not needed by most users: only inside the functions that use them.
HEAVY = frozenset(
    {
        "accelerate",
        "gguf",
        "networkx",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "openvino",
        "timm",
        "torchvision",
        "transformers",
    }
)

_IR = frozenset({"networkx", "numpy", "safetensors", "sympy", "torch"})
_PASSES = _IR | {"yaml"}
_BACKENDS = _PASSES | {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}
# `tools` may import all: it holds the command line and the benchmarks against other libraries.
THIRD_PARTY = {
    "ir": _IR,
    "passes": _PASSES,
    "backends": _BACKENDS,
    "planish": _BACKENDS | {"rich"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, and where: `inside` a function, or only for type checkers."""

    module: str
    line: int
    inside: bool
    typing_only: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def is_typing_guard(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_below(
    node: ast.AST, *, inside: bool = False, typing_only: bool = False
) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, inside, typing_only)
        return
    if isinstance(node, ast.ImportFrom):
        # `from planish import ir` names the folder `ir`, so each name is looked at with its module.
        prefix = "." * node.level + (node.module or "")
        for alias in node.names:
            yield Import(f"{prefix}.{alias.name}", node.lineno, inside, typing_only)
        return
    if isinstance(node, ast.If) and is_typing_guard(node):
        for statement in node.body:
            yield from imports_below(statement, inside=inside, typing_only=True)
        for statement in node.orelse:
            yield from imports_below(statement, inside=inside, typing_only=typing_only)
        return
    inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports_below(child, inside=inside, typing_only=typing_only)


def layer_of(module: str) -> str | None:
    """The folder a module of ours lies in; None for others' modules."""
    first, _, rest = module.partition(".")
    if first != "planish":
        return None
    second = rest.split(".")[0]
    return second if second in FOLDERS and second != "planish" else "planish"


def faults(folder: str, source: ast.Module, where: str) -> list[str]:
    """Say what is wrong with the imports of one file."""
    found = []
    for imported in imports_below(source):
        at = f"{where}:{imported.line}: {imported.module}"
        layer = layer_of(imported.module)
        if imported.module.startswith("."):
            found.append(f"{at} is relative; write planish.{folder}...")
        elif layer is not None:
            if ORDER.index(layer) > ORDER.index(folder):
                found.append(f"{at} points up, from {folder} to {layer}")
        elif imported.top in {"tests", *FOLDERS}:
            found.append(f"{at} is not the name it is imported by")
        elif imported.top not in sys.stdlib_module_names:
            if folder in THIRD_PARTY and imported.top not in THIRD_PARTY[folder]:
                found.append(f"{at} is no library that {folder} may use")
            if imported.top in HEAVY and not (imported.inside or imported.typing_only):
                found.append(f"{at} is heavy; import it inside the function that needs it")
    return found


@pytest.mark.parametrize("folder", ORDER)
def test_imports_keep_to_the_table(folder: str) -> None:
    paths: list[Path] = python_files(folder)
    assert paths, f"{folder}/ holds no Python file"
    assert [fault for path in paths for fault in faults(folder, tree(path), name_of(path))] == []


@pytest.mark.parametrize(
    ("folder", "source", "fault"),
    [
        ("ir", "import planish.passes.base", "points up, from ir to passes"),
        ("ir", "from planish import passes", "points up, from ir to passes"),
        ("ir", "def f():\n    from planish.tools import cli", "points up, from ir to tools"),
        ("backends", "import planish", "points up, from backends to planish"),
        ("planish", "from planish.tools.cli import main", "points up, from planish to tools"),
        ("passes", "from . import base", "is relative"),
        ("passes", "import ir.program", "is not the name it is imported by"),
        ("tools", "import tests.support", "is not the name it is imported by"),
        ("ir", "import onnx", "is no library that ir may use"),
        ("backends", "import onnx", "is heavy"),
        ("tools", "class A:\n    import transformers", "is heavy"),
        ("tools", "try:\n    from onnx import checker\nexcept ImportError: ...", "is heavy"),
    ],
)
def test_the_check_finds_a_fault(folder: str, source: str, fault: str) -> None:
    found = faults(folder, ast.parse(source), "x.py")
    assert fault in found[0]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("ir", "import torch\nimport json\nfrom planish.ir.program import Program"),
        ("ir", "def f():\n    import networkx"),
        ("backends", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx"),
        ("tools", "import planish\nfrom planish.backends import onnx_export\nimport click"),
    ],
)
def test_the_check_lets_pass_what_is_allowed(folder: str, source: str) -> None:
    assert faults(folder, ast.parse(source), "x.py") == []


# Libraries and parts of torch that would make the first line of every script slow. What torch loads
# by itself is not counted.
UNWANTED = HEAVY | {
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "tokenizers",
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
}


# The second statement of each proves that what was imported is the real thing.
@pytest.mark.parametrize(
    "statements", ["import planish; planish.optimize", "from planish.tools.cli import main"]
)
def test_importing_brings_in_no_heavy_library(statements: str) -> None:
    program = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        f"{statements}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    added = set(json.loads(found.stdout))
    assert "planish" in added
    assert sorted(added & UNWANTED) == []
