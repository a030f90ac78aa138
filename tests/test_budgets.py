"""Files and functions stay short enough to be read in one go."""

import ast
from pathlib import Path

import pytest

from tests.support.repository import FOLDERS, functions, name_of, python_files, tree

PASS_FILE, FILE, FUNCTION = 250, 400, 60

# File, or file::function -> (lines it may have, why it is better whole). Entries that are no longer
# needed fail a test.
EXCEPTIONS: dict[str, tuple[int, str]] = {}

PATHS = [path for folder in (*FOLDERS, "tests") for path in python_files(folder)]


def file_budget(path: Path) -> int:
    """Lines a file may have: a pass is a file in one of the family folders below `passes/`."""
    parts = Path(name_of(path)).parts
    is_pass = parts[0] == "passes" and len(parts) > 2
    return PASS_FILE if is_pass else FILE


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: documentation is not to be rationed."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def measured() -> dict[str, tuple[int, int]]:
    """Every file and function -> (its lines, its budget)."""
    found = {}
    for path in PATHS:
        name = name_of(path)
        found[name] = (len(path.read_text(encoding="utf-8").splitlines()), file_budget(path))
        for function, node in functions(tree(path)):
            found[f"{name}::{function}"] = (function_lines(node), FUNCTION)
    return found


def test_everything_is_within_its_budget() -> None:
    over = {
        name: f"{lines} lines, at most {EXCEPTIONS.get(name, (budget, ''))[0]}"
        for name, (lines, budget) in measured().items()
        if lines > EXCEPTIONS.get(name, (budget, ""))[0]
    }
    assert over == {}


def test_exceptions_have_reasons_and_are_needed() -> None:
    sizes = measured()
    stale = [name for name in EXCEPTIONS if name not in sizes or sizes[name][0] <= sizes[name][1]]
    assert stale == []
    assert [name for name, (_, reason) in EXCEPTIONS.items() if len(reason) < 20] == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f():\n    return 1", 2),
        ('def f():\n    """One.\n\n    Two.\n    """\n    return 1', 2),
        ("class A:\n    async def f(self):\n        x = 1\n        return x", 3),
    ],
)
def test_a_function_is_counted_without_its_docstring(source: str, lines: int) -> None:
    ((_, node),) = functions(ast.parse(source))
    assert function_lines(node) == lines


def test_functions_are_named_with_what_holds_them() -> None:
    source = "class A:\n    def f(self):\n        if self:\n            def g(): ...\ndef h(): ..."
    assert [name for name, _ in functions(ast.parse(source))] == ["A.f", "A.f.g", "h"]
