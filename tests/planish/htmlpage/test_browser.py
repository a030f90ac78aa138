"""The page in headless Chromium: it draws, filters, opens, finds, and nothing goes wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from planish.htmlpage import page
from tests.planish.htmlpage.reports import as_json, long_chain, small_report
from tests.support.browser import drive

# What a reader does, in order; each step writes down what the page shows then.
TOUR = """
    const rows = (id) => $$("#" + id + "-rows tr").map((row) => row.textContent);
    const boxes = (side) => Number($("#panel-" + side).dataset.boxes);
    const nodes = (side) => $$("#canvas-" + side + " [data-node]").map((one) => one.dataset.node);

    answer.title = document.title;
    answer.headings = $$("h2").map((one) => one.textContent);
    answer.empty = $$("main section").filter((one) => one.children.length < 2).map((one) => one.id);
    answer.numbers = $$("[data-path]").map((one) => ({ ...one.dataset, text: one.textContent }));
    answer.recipe = $("#recipe-text").textContent;
    answer.yaml = $("#recipe-yaml").textContent;
    answer.first = { before: boxes("before"), after: boxes("after") };
    answer.changes = rows("changes").length;

    type("#changes-filter", "remove-identities first.3");
    answer.nothing = rows("changes");
    type("#changes-filter", "dropout_3");
    answer.filtered = rows("changes");
    type("#changes-filter", "");

    const own = $$("#accuracy-table th button").find((one) => one.textContent === "own");
    const db = (row) => row.querySelector("[data-path$='own/sqnr_db']");
    const dbs = () => $$("#accuracy-rows tr").map(
      (row) => db(row) ? Number(db(row).dataset.value) : null);
    answer.worst_first = dbs();
    click(own);
    answer.best_first = dbs();

    click($("#hide-idle"));
    answer.all_passes = $$("button.pass").map((one) => one.textContent);
    $("#hide-idle").checked = false; $("#hide-idle").dispatchEvent(new Event("change"));
    answer.all_passes = $$("button.pass").map((one) => one.textContent);
    click($$("button.pass")[0]);
    answer.chip = $("#chosen").textContent;
    answer.in_pass = { changes: rows("changes").length, refusals: rows("refusals").length,
      accuracy: rows("accuracy") };
    answer.dimmed = $$("#canvas-before .dim-box").length;
    click($$("#reasons button")[0]);
    answer.one_reason = rows("refusals").length;
    key(document.body, "Escape");
    answer.after_escape = { chip: $("#chosen").textContent, changes: rows("changes").length,
      dimmed: $$("#canvas-before .dim-box").length };

    click($("#close-all"));
    answer.closed = { before: boxes("before"), after: boxes("after"), nodes: nodes("after") };
    const shut = $$("#canvas-after [data-group]").find((one) => one.dataset.group === ">first");
    answer.group = shut.textContent;
    click(shut);
    answer.opened = { before: boxes("before"), after: boxes("after") };
    const frame = $$("#canvas-before .frame [data-group]").find(
      (one) => one.dataset.group === ">first");
    key(frame, "Enter");
    answer.closed_again = { before: boxes("before"), after: boxes("after") };
    click($("#open-changes"));
    answer.with_changes = nodes("before").length;
    click($("#open-all"));
    answer.everything = { before: nodes("before"), after: nodes("after") };
    click($("#close-all"));

    type("#graph-search", "BATCH_NORM_7");
    answer.hits = $("#graph-hits").textContent;
    key($("#graph-search"), "Enter");
    await settled();
    answer.found = { hits: $("#graph-hits").textContent, details: $("#details").textContent,
      selected: $$("#canvas-before .selected").map((one) => one.dataset.node),
      match: $$("#canvas-before .match").map((one) => one.dataset.node) };
    const arrows = document.activeElement;
    $("#canvas-before").focus();
    key($("#canvas-before"), "ArrowDown");
    answer.keyboard = document.activeElement.getAttribute("role");

    $("#graph-constants").checked = true;
    $("#graph-constants").dispatchEvent(new Event("change"));
    click($("#open-all"));
    answer.constants = $$("#canvas-after .constant").length;
    $("#graph-color").value = "local"; $("#graph-color").dispatchEvent(new Event("change"));
    answer.heat = $$("#canvas-after .node").map(
      (one) => Number(one.style.getPropertyValue("--heat")));
    click($("[data-view=before]"));
    answer.panels = $$(".panel").filter((one) => one.offsetParent).map((one) => one.id);
    click($("[data-view=both]"));

    click($$("#accuracy-rows button.node")[0]);
    answer.linked = { details: $("#node-name").textContent,
      selected: $$("#canvas-after .selected [data-node], #canvas-after .selected").length };
"""


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return drive(small_report().to_html(), TOUR, tmp_path_factory.mktemp("tour"))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return as_json(small_report())


def test_nothing_goes_wrong_and_nothing_is_loaded(tour: dict[str, Any]) -> None:
    assert tour["problems"] == []
    assert tour["loaded"] == []
    assert tour["ready_ms"] > 0


def test_every_part_is_drawn(tour: dict[str, Any], report: dict[str, Any]) -> None:
    assert tour["title"] == "Net \N{EN DASH} planish report"
    assert tour["headings"] == [
        "Summary",
        "Remarks",
        "Passes",
        "Graph",
        "Where the accuracy went",
        "Changes",
        "Refusals",
        "Runtime",
        "Recipe",
    ]
    assert tour["empty"] == []
    assert tour["recipe"] == report["recipe"]
    assert tour["yaml"] == report["recipe_yaml"]
    assert min(tour["first"].values()) > 4


def test_every_number_stands_in_the_json(tour: dict[str, Any], report: dict[str, Any]) -> None:
    paths = set()
    for shown in tour["numbers"]:
        value: Any = report
        for part in shown["path"].split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            value = value[int(key)] if isinstance(value, list) else value[key]
        if "count" in shown:
            assert int(shown["count"]) == len(value)
        else:
            assert float(shown["value"]) == value
        paths.add(shown["path"])
    assert {
        "/totals/before/bytes",
        "/totals/after/macs",
        "/totals/ratio/parameters",
        "/totals/seconds/capture",
        "/fidelity/sqnr_db",
        "/passes/0/changes",
        "/passes/0/refusals",
        "/passes/1/seconds",
        "/passes/2/fidelity/sqnr_db",
        "/passes/2/cumulative/sqnr_db",
        "/passes/2/node_errors/0/own/sqnr_db",
        "/passes/2/bytes",
    } <= paths


def test_tables_filter_and_sort(tour: dict[str, Any], report: dict[str, Any]) -> None:
    assert tour["changes"] == report["totals"]["changes"] == 68
    assert tour["nothing"] == ["Nothing matches the filter."]
    assert len(tour["filtered"]) == 1
    assert "remove-identities" in tour["filtered"][0]
    own = [e["own"]["sqnr_db"] for e in report["passes"][2]["node_errors"]]
    # What is identical has no SQNR in JSON; it comes after all that is not.
    errors = [*sorted(db for db in own if db is not None), *(db for db in own if db is None)]
    assert tour["worst_first"] == errors
    assert tour["best_first"] == errors[::-1]


def test_choosing_a_pass_filters_everything_else(tour: dict[str, Any]) -> None:
    assert tour["all_passes"] == [
        "fold-batch-norm",
        "remove-identities",
        "round-weights",
        "fold-scalar",
    ]
    assert "fold-batch-norm" in tour["chip"]
    assert tour["in_pass"] == {
        "changes": 16,
        "refusals": 2,
        "accuracy": ["Nothing matches the filter."],
    }
    assert tour["one_reason"] == 1
    assert tour["dimmed"] > 0
    assert tour["after_escape"] == {"chip": "", "changes": 68, "dimmed": 0}


def test_modules_open_and_close(tour: dict[str, Any], report: dict[str, Any]) -> None:
    # Input, two stages, the last batch norm, a product, and the output.
    assert tour["closed"] == {
        "before": 6,
        "after": 6,
        "nodes": ["image", "batch_norm_16", "mul", "output:0"],
    }
    assert "first" in tour["group"]
    assert "24 nodes" in tour["group"]
    assert tour["opened"] == {"before": 6 + 7, "after": 6 + 7}
    assert tour["closed_again"] == {"before": 6, "after": 6}
    assert tour["with_changes"] > 40
    for side in ("before", "after"):
        drawn = {n["name"] for n in report["graphs"][side]["nodes"] if n["kind"] != "constant"}
        assert set(tour["everything"][side]) == drawn


def test_search_finds_and_shows_the_node(tour: dict[str, Any]) -> None:
    assert tour["hits"] == "1 before, 0 after"
    assert tour["found"]["hits"] == "1 of 1: 1 before, 0 after"
    assert tour["found"]["selected"] == ["batch_norm_7"]
    assert tour["found"]["match"] == ["batch_norm_7"]
    details = tour["found"]["details"]
    assert "aten.batch_norm" in details
    assert "fold-batch-norm" in details  # which pass removed it
    assert "self.bn(self.conv(x))" in details  # the user's own line
    assert "first.7.bn (BatchNorm2d)" in details
    assert tour["keyboard"] == "button"


def test_constants_errors_and_single_panels(tour: dict[str, Any], report: dict[str, Any]) -> None:
    after = report["graphs"]["after"]["nodes"]
    assert tour["constants"] == sum(n["kind"] == "constant" for n in after) > 0
    assert max(tour["heat"]) > 0.5
    assert tour["panels"] == ["panel-before"]
    assert tour["linked"] == {"details": "aten.conv2d", "selected": 1}


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "<svg/onload=alert(3)>&lt;b&gt;\u2028\u2029'\"`${alert(4)}",
    "javascript:alert(5) <!-- <script> ]]> --> \\u003c/script>",
)


def spoiled(value: Any, seen: list[int]) -> Any:
    """A report in which every string that may come from a model or a recipe is hostile."""
    kept = {"status", "kind", "contract"}
    done: tuple[str, ...] = ()
    if isinstance(value, dict):
        if "name" in value and "inputs" in value:  # a node: keep names consistent, and hostile
            value = {
                key: [f"{v}{HOSTILE[0]}" for v in item]
                if key in ("inputs", "partners")
                else f"{item}{HOSTILE[0]}"
                if key == "name"
                else item
                for key, item in value.items()
            }
            done = ("name", "inputs", "partners")
        return {
            (key if key.islower() and key.isidentifier() else key + HOSTILE[1]): (
                item if key in kept or key in done else spoiled(item, seen)
            )
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [spoiled(item, seen) for item in value]
    if isinstance(value, str):
        seen.append(1)
        return value + HOSTILE[len(seen) % len(HOSTILE)]
    return value


@pytest.fixture(scope="module")
def hostile_report(report: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(report)
    data["remarks"] = ["a remark"]
    data["runtime"] = {
        "runtime": "x 1",
        "operators": {"Conv": 3},
        "notes": ["n"],
        "more": [{"a": 1}],
    }
    found: dict[str, Any] = spoiled(data, [])
    return found


def test_hostile_names_stay_text(hostile_report: dict[str, Any], tmp_path: Path) -> None:
    script = """
        answer.model = $("h1").textContent;
        answer.remarks = $("#remarks").textContent;
        click($$("button.pass")[0]);
        click($("#open-all"));
        $("#graph-constants").checked = true;
        $("#graph-constants").dispatchEvent(new Event("change"));
        click($$("#canvas-before .node")[3]);
        answer.details = $("#details").textContent;
        type("#graph-search", "</script><script>alert(1)");
        answer.hits = $("#graph-hits").textContent;
        type("#changes-filter", "<img src=x onerror");
        answer.rows = $$("#changes-rows tr").length;
        answer.foreign = $$("img, iframe, main script, header script").length;
        answer.scripts = $$("script").length;
        answer.links = $$("[href], [src]").map((one) =>
          one.getAttribute("href") || one.getAttribute("src"));
    """
    seen = drive(page(hostile_report), script, tmp_path)
    assert seen["problems"] == []
    assert seen["loaded"] == []
    assert seen["model"] == hostile_report["model"]
    assert "alert(" in seen["model"]
    assert "alert(" in seen["remarks"]
    assert "alert(" in seen["details"]
    assert seen["hits"] != "0 before, 0 after"
    assert seen["rows"] > 1
    assert seen["foreign"] == 0
    assert seen["scripts"] == 3 + 2  # the data, the layout, the page; and the two of this test
    assert all(link.startswith(("#", "data:,")) for link in seen["links"])


def test_a_graph_of_thousands_of_nodes_is_drawn_in_parts(tmp_path: Path) -> None:
    script = """
        answer.first = Number($("#panel-before").dataset.boxes);
        click($("#open-all"));
        answer.all = Number($("#panel-before").dataset.boxes);
        answer.note = $("#graph-note").textContent;
        type("#graph-search", "relu_2500");
        key($("#graph-search"), "Enter");
        await settled();
        answer.selected = $$("#canvas-before .selected").map((one) => one.dataset.node);
        answer.then = Number($("#panel-before").dataset.boxes);
        answer.second_note = $("#graph-note").textContent;
    """
    seen = drive(page(long_chain(3000)), script, tmp_path)
    assert seen["problems"] == []
    assert 0 < seen["first"] <= 60
    assert 300 < seen["all"] <= 400
    assert seen["note"].startswith("At most 400 boxes are drawn at once in a panel: ")
    assert seen["selected"] == ["relu_2500"]
    assert seen["then"] <= 400
    assert "closed" in seen["second_note"]


def test_a_report_without_graphs_says_so(report: dict[str, Any], tmp_path: Path) -> None:
    bare = {key: value for key, value in report.items() if key != "graphs"}
    seen = drive(page(bare), 'answer.graph = $("#graph").textContent;', tmp_path)
    assert seen["problems"] == []
    assert "saved without its graphs" in seen["graph"]
