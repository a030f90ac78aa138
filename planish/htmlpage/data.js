// The report, and what everything on the page shares: the chosen pass and the chosen node.

const DATA = JSON.parse($("data").textContent);
const PASSES = DATA.passes;
const GRAPHS = DATA.graphs || null;

const at = (path) => path.reduce((value, key) => (value === null || value === undefined ? value : value[key]), DATA);
const pointer = (path) =>
  "/" + path.map((key) => String(key).replaceAll("~", "~0").replaceAll("/", "~1")).join("/");

// A number of the report: where it stands in the JSON is written beside it.
function number(path, how = "whole", missing = "\u2013") {
  const value = at(path);
  if (typeof value !== "number") return h("span", { class: "dim" }, missing);
  return h(
    "span",
    { class: "number", "data-path": pointer(path), "data-value": String(value), title: String(value) },
    format[how](value),
  );
}

// How many entries a list of the report has.
function count(path) {
  const length = (at(path) || []).length;
  return h("span", { class: "number", "data-path": pointer(path), "data-count": length }, format.whole(length));
}

// The SQNR of a fidelity in the report; infinite is null in JSON, and `equal` tells the good one.
function sqnr(path) {
  const fidelity = at(path);
  if (!fidelity) return h("span", { class: "dim", title: "not measured" }, "\u2013");
  if (typeof fidelity.sqnr_db === "number") return number([...path, "sqnr_db"], "db");
  if (fidelity.equal) return h("span", { class: "good" }, "identical");
  if (fidelity.equal === false) return h("span", { class: "bad" }, "not finite");
  return h("span", { class: "dim" }, "\u2013");
}

// Larger is worse; identical is 0 and what is not finite is infinite.
function badness(fidelity) {
  if (!fidelity) return null;
  if (typeof fidelity.sqnr_db === "number") return Math.pow(10, -fidelity.sqnr_db / 20);
  return fidelity.equal === true ? 0 : fidelity.equal === false ? Infinity : null;
}

// -- flat lists, each row with the pass it belongs to and its place in the JSON ------------------

function rowsOf(key) {
  return PASSES.flatMap((entry, index) =>
    (entry[key] || []).map((value, position) => ({
      value,
      pass: index,
      passName: entry.name,
      path: ["passes", index, key, position],
    })),
  );
}

const CHANGES = rowsOf("changes");
const REFUSALS = rowsOf("refusals");
const ERRORS = rowsOf("node_errors");
const BY_NUMBER = new Map(CHANGES.map((row) => [row.value.number, row]));

function group(rows, keys) {
  const found = new Map();
  for (const row of rows) {
    for (const key of new Set(keys(row))) {
      if (!found.has(key)) found.set(key, []);
      found.get(key).push(row);
    }
  }
  return found;
}

const REFUSALS_AT = group(REFUSALS, (row) => [row.value.node]);
const ERRORS_AT = group(ERRORS, (row) => [row.value.node]);
const CHANGES_AT = group(CHANGES, (row) => [
  row.value.node,
  ...(row.value.removed || []),
  ...(row.value.added || []),
  ...(row.value.replaced || []).flat(),
]);

// -- what the reader has chosen ------------------------------------------------------------------

const chosen = { pass: null };
const listeners = [];
const onPass = (listener) => listeners.push(listener);

function choosePass(index) {
  chosen.pass = chosen.pass === index ? null : index;
  for (const listener of listeners) listener();
}

const inPass = (row) => chosen.pass === null || row.pass === chosen.pass;

const passButton = (index) =>
  h(
    "button",
    {
      type: "button",
      class: "link",
      title: "Show only this pass",
      onclick: () => chosen.pass !== index && choosePass(index),
    },
    h("span", { class: "step" }, index + 1),
    ` ${PASSES[index].name}`,
  );

// Filled in by graphs.js; a table's node names lead to the graph.
const graphLinks = { has: () => false, show: () => {} };

function nodeButton(name, side) {
  if (!graphLinks.has(name, side)) return h("code", { class: "node" }, name);
  return h(
    "button",
    {
      type: "button",
      class: "link node",
      title: "Show in the graph",
      onclick: () => graphLinks.show(name, side),
    },
    name,
  );
}
