"""The report as one HTML page that loads nothing: data, style and scripts stand in the file.

``page`` puts the dictionary of ``Report.to_dict(graphs=True)`` into a template, as JSON that the
page's own scripts draw. Whatever the page shows is read from there. Names in a report come from
models and are hostile until proven otherwise: the JSON holds no character that could end its
element, and the scripts write text as text only.

The scripts are plain files beside this one, joined in the order of ``SCRIPTS``; ``dagre.min.js``
lays out graphs and is another project's work (its license is in ``dagre.LICENSE.txt``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from planish.ir.errors import UsageError

__all__ = ["check_report", "embedded", "page"]

# The page's own scripts, in the order in which they build upon each other.
SCRIPTS = (
    "dom.js",
    "data.js",
    "tables.js",
    "summary.js",
    "timeline.js",
    "hierarchy.js",
    "layout.js",
    "canvas.js",
    "details.js",
    "graphs.js",
    "sections.js",
    "main.js",
)

_MARK = re.compile(r"/\*([A-Z]+)\*/")

# What a page cannot do without: key -> type. The rest may be missing and is then left out.
_TOP: dict[str, type | tuple[type, ...]] = {
    "passes": list,
    "totals": dict,
    "target": str,
    "versions": dict,
    "seed": int,
    "recipe": str,
    "remarks": list,
}
_PASS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "options": str,
    "contract": str,
    "changes": list,
    "refusals": list,
    "seconds": (int, float),
    "bytes": int,
    "remarks": list,
}
_NODE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "id", "kind", "operator", "type", "call", "status"), str),
    **dict.fromkeys(("inputs", "modules", "edits", "partners"), list),
}


def page(report: Mapping[str, Any]) -> str:
    """A report as a complete HTML document.

    Args:
        report: what ``Report.to_dict(graphs=True)`` gives; without graphs the page says so.

    Raises:
        UsageError: this is no report; says what is missing.
    """
    check_report(report)
    own = "\n".join(_read(name) for name in SCRIPTS)
    parts = {
        "STYLE": _read("style.css"),
        "DATA": embedded(report),
        "DAGRE": _read("dagre.min.js"),
        "SCRIPT": f'(() => {{\n"use strict";\n{own}\n}})();',
    }
    # One pass over the template: what is put in is not searched for marks again.
    return _MARK.sub(lambda mark: parts[mark[1]], _read("template.html"))


def embedded(report: Mapping[str, Any]) -> str:
    """A report as JSON in ASCII that can stand in an HTML element whatever strings it holds."""
    text = json.dumps(report, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def check_report(data: object) -> None:
    """Refuse what is not the dictionary of a report.

    Raises:
        UsageError: says which part is missing or of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise UsageError(
            f"this is a {type(data).__name__}, not a report",
            hint="give a report that planish wrote: planish optimize MODEL --report report.json",
        )
    _check(data, _TOP, "the report")
    for number, entry in enumerate(data["passes"], 1):
        _check(entry, _PASS, f"pass {number} of the report")
    for part in ("before", "after", "seconds"):
        if not isinstance(data["totals"].get(part), Mapping):
            raise UsageError(f"the totals of the report have no {part!r}")
    if data.get("graphs") is not None:
        _check(data["graphs"], {"before": dict, "after": dict}, "the part 'graphs' of the report")
        for side in ("before", "after"):
            _check(data["graphs"][side], {"nodes": list, "modules": dict}, f"the graph {side}")
            for number, node in enumerate(data["graphs"][side]["nodes"], 1):
                _check(node, _NODE, f"node {number} of the graph {side}")


def _check(data: object, wanted: Mapping[str, type | tuple[type, ...]], what: str) -> None:
    if not isinstance(data, Mapping):
        raise UsageError(f"{what} is a {type(data).__name__}")
    for key, kind in wanted.items():
        if not isinstance(data.get(key), kind):
            found = type(data[key]).__name__ if key in data else "missing"
            raise UsageError(
                f"{what} has no usable {key!r}: it is {found}",
                hint="give a report that this version of planish wrote",
            )


@cache
def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
