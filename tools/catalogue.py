"""The table of passes in the README, made from the registry.

python -m planish.tools.catalogue           prints it
python -m planish.tools.catalogue README.md writes it between the two markers
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from planish.passes.recipe import RECIPES
from planish.passes.registry import REGISTRY, load_pass
from planish.tools.passes import describe

_MARKERS = re.compile(r"(<!-- passes: [^\n]*-->\n).*?(<!-- end of passes -->)", re.S)


def table() -> str:
    """The passes as a Markdown table; those of the recipe ``exact`` are marked."""
    rows = ["| pass | contract | in `exact` | what it does |", "|---|---|---|---|"]
    for name in REGISTRY:
        facts = describe(name, load_pass(name))
        inside = "yes" if name in RECIPES["exact"] else ""
        rows.append(f"| `{name}` | {facts['contract']} | {inside} | {facts['summary']} |")
    return "\n".join(rows) + "\n"


def insert(text: str) -> str:
    """The README's text with a fresh table."""
    return _MARKERS.sub(lambda m: m[1] + table() + m[2], text)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
