"""The page as a file: what it carries, what it may load (nothing), and how large it is."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import planish
from planish.htmlpage import SCRIPTS, embedded, page
from planish.ir.errors import UsageError
from tests.planish.htmlpage.reports import as_json, small_report
from tests.support.browser import drive
from tests.support.real_models import inputs, loaded
from tests.support.repository import ROOT

FOLDER = ROOT / "planish" / "htmlpage"


class Elements(HTMLParser):
    """Elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def test_the_page_carries_exactly_the_json_report() -> None:
    report = small_report()
    scripts = Elements(report.to_html()).scripts
    assert len(scripts) == 3
    assert json.loads(scripts[0]) == as_json(report)


def test_hostile_text_cannot_leave_the_data() -> None:
    hostile = "</script><!--<script>&amp;\u2028\u2029\ud800 /*SCRIPT*/ /*DATA*/ ]]>"
    data = {**as_json(small_report()), "model": hostile, "remarks": [hostile], hostile: hostile}
    text = embedded(data)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == data
    html = page(data)
    html.encode("utf-8")
    assert json.loads(Elements(html).scripts[0]) == data
    # Nothing of the report stands anywhere else.
    assert len(html) - len(text) == len(page(as_json(small_report()))) - len(
        embedded(as_json(small_report()))
    )


def test_nothing_can_be_loaded() -> None:
    html = small_report().to_html()
    elements = Elements(html).found
    policies = [a["content"] for _, a in elements if a.get("http-equiv")]
    assert policies == [
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    ]
    addresses = [
        str(address)
        for tag, attributes in elements
        for name, address in attributes.items()
        if name in ("src", "href", "action", "data", "srcset", "poster") and tag != "script"
    ]
    assert sorted(set(addresses)) == ["#passes", "data:,"]
    assert not [a for tag, a in elements if tag == "script" and "src" in a]
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_scripts_write_text_as_text() -> None:
    banned = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc"
        r"|createContextualFragment|DOMParser|fetch\(|XMLHttpRequest|WebSocket|import\(|sendBeacon"
    )
    for name in (*SCRIPTS, "dagre.min.js"):
        source = (FOLDER / name).read_text(encoding="utf-8")
        assert banned.findall(source) == [], name
        assert "</script" not in source, name
        assert set(re.findall(r"https?://[^\s\"'`)]*", source)) <= {
            "http://www.w3.org/2000/svg",  # a name, not an address
        }, name


def test_the_folder_holds_what_the_page_reads() -> None:
    files = {path.name for path in FOLDER.iterdir() if path.is_file()}
    read = {*SCRIPTS, "dagre.min.js", "style.css", "template.html"}
    assert files == read | {"__init__.py", "dagre.LICENSE.txt"}


def test_the_vendored_library_names_itself_and_its_license() -> None:
    source = (FOLDER / "dagre.min.js").read_text(encoding="utf-8")
    license_ = (FOLDER / "dagre.LICENSE.txt").read_text(encoding="utf-8")
    head = source[: source.index("*/")]
    assert "@dagrejs/dagre 3.1.3" in head
    assert "MIT License" in head
    assert license_.strip() in head
    assert "sourceMappingURL" not in source


def test_what_is_no_report_is_refused() -> None:
    data = as_json(small_report())
    no_node = {**data["graphs"], "after": {"nodes": [{"name": "x"}], "modules": {}}}
    broken: list[Any] = [
        None,
        [],
        {**data, "seed": "0"},
        {**data, "passes": [{}]},
        {**data, "graphs": []},
        {**data, "graphs": {"before": {}}},
        {**data, "graphs": no_node},
    ]
    for spoiled in broken:
        with pytest.raises(UsageError):
            page(spoiled)


def test_minilm_is_small_and_opens(tmp_path: Path) -> None:
    _, model = loaded("minilm")
    args, kwargs = inputs("minilm")
    html = planish.optimize(model, (args, kwargs)).report.to_html()
    assert len(html.encode()) < 5_000_000
    script = """
        answer.changes = $$("#changes-rows tr").length;
        click($("#open-all"));
        answer.nodes = $$("#canvas-after [data-node]").length;
    """
    seen: dict[str, Any] = drive(html, script, tmp_path)
    assert seen["problems"] == []
    assert seen["loaded"] == []
    assert seen["changes"] > 10
    assert seen["nodes"] > 100
    print(f"MiniLM: {len(html.encode()) / 1e6:.2f} MB, drawn after {seen['ready_ms']} ms")
