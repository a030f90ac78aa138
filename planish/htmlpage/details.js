// What is known of one node, beside the graph.

const STATUS = {
  kept: "kept as it was",
  edited: "edited in place",
  removed: "removed",
  added: "added",
};

function changeLine(changeNumber) {
  const row = BY_NUMBER.get(changeNumber);
  if (!row) return "no change says which pass did it";
  return [`change ${row.value.number}: `, h("b", {}, row.value.rule), " of ", passButton(row.pass)];
}

function nodeDetails(node, side, graph) {
  const other = side === "before" ? "after" : "before";
  const users = graph.nodes.filter((one) => one.inputs.includes(node.name));
  const mentions = (CHANGES_AT.get(node.name) || []).filter((row) => row.value.number !== node.change);
  const refusals = REFUSALS_AT.get(node.name) || [];
  const errors = ERRORS_AT.get(node.name) || [];
  const links = (names, where) => names.map((name) => h("li", {}, nodeButton(name, where)));
  const row = (label, content) => content && [h("dt", {}, label), h("dd", {}, content)];
  const list = (label, names, where) => names.length > 0 && row(label, h("ul", { class: "names" }, links(names, where)));
  return [
    h("p", { class: "over" }, `${node.kind}, ${side}`),
    h("h3", { id: "node-name" }, node.kind === "operator" ? node.operator : node.id),
    h("p", {}, h("span", { class: `status ${node.status}` }, STATUS[node.status])),
    h(
      "dl",
      {},
      row("name", h("code", {}, node.id === node.name ? node.name : `${node.name} (${node.id})`)),
      row("type", h("code", {}, node.type)),
      typeof node.bytes === "number" && row("size", format.bytes(node.bytes)),
      node.kind === "operator" && row("call", h("code", { class: "call" }, node.call)),
      row("module", node.modules.length > 0 && h("code", {}, modulePath(node, graph))),
      row("source", node.source && source(node.source)),
      node.status === "removed" && row("removed by", changeLine(node.change)),
      node.status === "added" && row("made by", changeLine(node.change)),
      node.edits.map((edit) => row("edited by", changeLine(edit))),
      list(side === "before" ? "became" : "stands for", node.partners, other),
      list("reads", node.inputs, side),
      list("read by", users.map((one) => one.name), side),
    ),
    errors.length > 0 && errorBox(errors),
    refusals.length > 0 && [
      h("h4", {}, "Declined here"),
      h(
        "ul",
        { class: "lines" },
        refusals.map((one) => h("li", {}, h("b", {}, one.value.rule), ` (${one.passName}): `, one.value.reason)),
      ),
    ],
    mentions.length > 0 && [
      h("h4", {}, "Changes that name it"),
      h("ul", { class: "lines" }, mentions.map((one) => h("li", {}, changeLine(one.value.number)))),
    ],
  ];
}

function modulePath(node, graph) {
  const path = node.modules[node.modules.length - 1];
  return graph.modules[path] ? `${path} (${graph.modules[path]})` : path;
}

function errorBox(errors) {
  return [
    h("h4", {}, "Error of its value"),
    errors.map((one) =>
      h(
        "dl",
        {},
        h("dt", {}, "by"),
        h("dd", {}, h("b", {}, one.value.rule), " of ", passButton(one.pass)),
        one.value.constant && [h("dt", {}, "constant"), h("dd", {}, h("code", {}, one.value.constant))],
        [
          ["own", "this rewrite alone"],
          ["local", "against before the pass"],
          ["cumulative", "against the original"],
        ].map(([key, label]) => [h("dt", {}, label), h("dd", {}, sqnr([...one.path, key]))]),
      ),
    ),
  ];
}
