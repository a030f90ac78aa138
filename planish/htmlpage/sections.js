// The tables: accuracy, changes, refusals; and what the runtime and the recipe say.

const passColumn = {
  title: "pass",
  cell: (row) => passButton(row.pass),
  sort: (row) => row.pass,
  text: (row) => row.passName,
};
const ruleColumn = {
  title: "rule",
  align: "nowrap",
  cell: (row) => row.value.rule,
  sort: (row) => row.value.rule,
  text: (row) => row.value.rule,
};
const sourceColumn = {
  title: "source",
  cell: (row) => source(row.value.source),
  sort: (row) => row.value.source || null,
  text: (row) => row.value.source || "",
};

// Names of nodes, a few at first.
function names(list, side, change) {
  const most = 4;
  const link = (name) => {
    // A name may have been given again; only the node that this change made or removed is meant.
    const node = GRAPHS && sides[side] && sides[side].byName.get(name);
    return node && node.change === change ? nodeButton(name, side) : h("code", { class: "node" }, name);
  };
  const items = (part) => part.map((name) => [link(name), " "]);
  if (list.length <= most) return list.length ? h("span", {}, items(list)) : h("span", { class: "dim" }, "\u2013");
  const box = h("span", {}, items(list.slice(0, most - 1)));
  const rest = h(
    "button",
    { type: "button", class: "link dim", onclick: () => rest.replaceWith(...items(list.slice(most - 1)).flat()) },
    `and ${list.length - most + 1} more`,
  );
  box.append(rest);
  return box;
}

function drawAccuracy() {
  const section = $("accuracy");
  if (!ERRORS.length) {
    const lossy = PASSES.some((entry) => entry.contract === "lossy");
    section.append(
      h(
        "p",
        { class: "none" },
        lossy
          ? "No error per node was measured for the lossy passes of this run."
          : "No lossy pass ran, so there is no error per node. What each pass did to the outputs stands with the passes.",
      ),
    );
    return;
  }
  const error = (title, key, hint) => ({
    title,
    hint,
    align: "right",
    largest: true,
    cell: (row) => sqnr([...row.path, key]),
    sort: (row) => badness(row.value[key]),
  });
  const columns = [
    passColumn,
    { title: "site", align: "right", cell: (row) => number([...row.path, "site"], "plain"), sort: (row) => row.value.site },
    ruleColumn,
    {
      title: "node",
      cell: (row) => [nodeButton(row.value.node, "after"), row.value.constant && h("div", { class: "dim" }, h("code", {}, row.value.constant))],
      sort: (row) => row.value.node,
      text: (row) => `${row.value.node} ${row.value.replaces} ${row.value.constant || ""}`,
    },
    error("own", "own", "Error of this rewrite alone"),
    error("local", "local", "The value against the program before the pass"),
    error("cumulative", "cumulative", "The value against the original program"),
    {
      title: "relative L2",
      align: "right",
      largest: true,
      hint: "Of this rewrite alone",
      cell: (row) => number([...row.path, "own", "rel_l2"], "small"),
      sort: (row) => (row.value.own ? row.value.own.rel_l2 : null),
    },
    sourceColumn,
  ];
  const made = table({ id: "accuracy", rows: ERRORS, columns, label: "nodes", sorted: 4, descending: true });
  section.append(h("p", { class: "hint" }, "SQNR of every value that a lossy pass rewrote; the worst rewrites first."), made.element);
}

function drawChanges() {
  const columns = [
    { title: "#", align: "right", cell: (row) => number([...row.path, "number"], "plain"), sort: (row) => row.value.number, text: (row) => `#${row.value.number}` },
    passColumn,
    ruleColumn,
    {
      title: "removed",
      cell: (row) => names(row.value.removed || [], "before", row.value.number),
      text: (row) => `${row.value.node} ${(row.value.removed || []).join(" ")}`,
      sort: (row) => (row.value.removed || []).length,
      largest: true,
      hint: "Nodes that went away; sorts by how many",
    },
    {
      title: "added",
      cell: (row) => names(row.value.added || [], "after", row.value.number),
      text: (row) => (row.value.added || []).join(" "),
      sort: (row) => (row.value.added || []).length,
      largest: true,
      hint: "Nodes that came; sorts by how many",
    },
    {
      title: "detail",
      cell: (row) => [row.value.detail || "", row.value.error && errorText(row.value.error)],
      text: (row) => row.value.detail || "",
    },
    sourceColumn,
  ];
  if (!CHANGES.length) $("changes").append(h("p", { class: "none" }, "No pass changed anything."));
  else $("changes").append(table({ id: "changes", rows: CHANGES, columns, label: "changes" }).element);
}

const errorText = (error) =>
  h("span", { class: "dim" }, ` ${Object.entries(error).map(([key, value]) => `${key} ${value}`).join(", ")}`);

function drawRefusals() {
  if (!REFUSALS.length) {
    $("refusals").append(h("p", { class: "none" }, "No rule declined anywhere."));
    return;
  }
  const columns = [
    passColumn,
    ruleColumn,
    {
      title: "node",
      cell: (row) => nodeButton(row.value.node, sideOf(row.value.node, null)),
      sort: (row) => row.value.node,
      text: (row) => row.value.node,
    },
    { title: "reason", cell: (row) => row.value.reason, sort: (row) => row.value.reason, text: (row) => row.value.reason },
    sourceColumn,
  ];
  const made = table({ id: "refusals", rows: REFUSALS, columns, label: "refusals" });
  const reasons = h("ul", { class: "reasons", id: "reasons" });
  let picked = null;
  made.view.extra = (row) => picked === null || row.value.reason === picked;
  const draw = () => {
    const groups = [...group(REFUSALS.filter(inPass), (row) => [row.value.reason])].sort((a, b) => b[1].length - a[1].length);
    if (picked !== null && !groups.some(([reason]) => reason === picked)) picked = null;
    clear(
      reasons,
      groups.map(([reason, rows]) =>
        h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              "aria-pressed": String(reason === picked),
              onclick: () => {
                picked = picked === reason ? null : reason;
                draw();
                made.draw();
              },
            },
            h("b", {}, format.whole(rows.length)),
            h("span", {}, reason),
            h("span", { class: "dim" }, [...new Set(rows.map((row) => row.passName))].join(", ")),
          ),
        ),
      ),
    );
  };
  onPass(draw);
  draw();
  made.draw();
  const hint = h("p", { class: "hint" }, "By reason; choose one to see its nodes.");
  $("refusals").append(hint, reasons, made.element);
}

const RUNTIME_LABELS = { bytes: "size of the file", path: "file", max_abs: "largest difference" };

function drawRuntime() {
  const section = $("runtime");
  const runtime = DATA.runtime;
  if (!runtime) {
    section.append(h("p", { class: "none" }, "Nothing was exported, so no runtime was asked what it makes of the program."));
    return;
  }
  const operators = Object.entries(runtime.operators || {}).sort((a, b) => b[1] - a[1]);
  const most = Math.max(1, ...operators.map(([, times]) => times));
  const apart = ["operators", "notes", "kernels"];
  const facts = Object.entries(runtime).filter(([key]) => !apart.includes(key));
  section.append(
    h("dl", { class: "facts-list" }, facts.map(([key, value]) => [h("dt", {}, RUNTIME_LABELS[key] || key.replaceAll("_", " ")), h("dd", {}, plainValue(value, ["runtime", key]))])),
    (runtime.notes || []).length > 0 && h("ul", { class: "remarks" }, runtime.notes.map((text) => h("li", {}, text))) || "",
    h(
      "ul",
      { class: "bars", "aria-label": "Operators that the runtime runs" },
      operators.map(([name, times]) =>
        h("li", {}, h("code", {}, name), h("span", { class: "track" }, meter(times / most, "exact")), number(["runtime", "operators", name])),
      ),
    ),
    kernelTable(runtime.kernels || []),
  );
}

// What runs each quantized operator: an integer kernel, or float and why.
function kernelTable(kernels) {
  if (!kernels.length) return "";
  const head = ["quantized operator", "node", "integer kernel", "why in float"];
  const row = (use) =>
    h(
      "tr",
      {},
      h("td", {}, h("code", {}, use.operator)),
      h("td", { title: use.source || "" }, use.node),
      h("td", {}, use.kernel || "\u2013"),
      h("td", {}, use.reason),
    );
  return h(
    "div",
    { class: "scroll" },
    h(
      "table",
      { id: "kernels" },
      h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, kernels.map(row)),
    ),
  );
}

// The weights that are typed sparse: how many zeros, and what they take dense and packed.
function drawSparsity() {
  const sparsity = DATA.sparsity;
  if (!sparsity) return;
  const head = ["sparse weight", "layout", "dtype", "zeros", "dense", "packed"];
  const row = (weight, index) => {
    const at = (key) => ["sparsity", "weights", index, key];
    return h(
      "tr",
      {},
      h("td", {}, h("code", {}, weight.name)),
      h("td", {}, h("code", {}, weight.layout)),
      h("td", {}, weight.dtype),
      h("td", {}, `${(100 * weight.zeros).toFixed(1)}%`),
      h("td", {}, number(at("dense_bytes"), "bytes")),
      h("td", {}, weight.packed_bytes === null ? "\u2013" : number(at("packed_bytes"), "bytes")),
    );
  };
  const table = h(
    "table",
    { id: "sparse-weights" },
    h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, sparsity.weights.map(row)),
  );
  $("summary").append(h("h3", {}, "Sparse weights"), h("div", { class: "scroll" }, table));
  if (sparsity.note) $("summary").append(h("p", { class: "note" }, sparsity.note));
}

// Whatever else a runtime reports: numbers, text, lists and tables of these.
function plainValue(value, path) {
  if (typeof value === "number") {
    const how = path[path.length - 1] === "bytes" ? "bytes" : Number.isInteger(value) ? "whole" : "small";
    return number(path, how);
  }
  if (Array.isArray(value)) {
    if (value.every((one) => typeof one !== "object")) return value.length ? value.join(", ") : "none";
    return h("ul", { class: "lines" }, value.map((one, index) => h("li", {}, plainValue(one, [...path, index]))));
  }
  if (value && typeof value === "object") {
    return h("dl", {}, Object.entries(value).map(([key, one]) => [h("dt", {}, key), h("dd", {}, plainValue(one, [...path, key]))]));
  }
  return value === null || value === undefined ? "\u2013" : String(value);
}

function drawRecipe() {
  const block = (id, title, text) => {
    const shown = h("pre", { id, tabindex: "0" }, text);
    const button = h("button", { type: "button", onclick: () => copy(text, button, shown) }, "Copy");
    return h("div", { class: "block" }, h("div", { class: "bar" }, h("h3", {}, title), button), shown);
  };
  $("recipe").append(
    block("recipe-text", "As text", DATA.recipe),
    DATA.recipe_yaml ? block("recipe-yaml", "As YAML", DATA.recipe_yaml) : "",
  );
}
