"""The checkout as the tests about its own shape see it: folders, files and import names."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Folder -> the name it is imported by, in the order in which imports may point back.
FOLDERS = {
    "ir": "planish.ir",
    "passes": "planish.passes",
    "backends": "planish.backends",
    "planish": "planish",
    "tools": "planish.tools",
}


@cache
def pyproject() -> dict[str, Any]:
    """`pyproject.toml`, parsed."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files(folder: str) -> list[Path]:
    """Every file below a folder of the checkout, without what Python and tools leave there."""
    return sorted(
        path
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    )


def python_files(folder: str) -> list[Path]:
    """Every Python file below a folder of the checkout."""
    return [path for path in files(folder) if path.suffix == ".py"]


def name_of(path: Path) -> str:
    """A path as a reader of the repository would write it: `ir/program.py`."""
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=name_of(path))


def functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of a file with its qualified name: `Program.clone`, `outer.inner`."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                yield name, child
                yield from below(child, f"{name}.")
            else:
                yield from below(child, prefix)

    for name, node in below(module, ""):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
