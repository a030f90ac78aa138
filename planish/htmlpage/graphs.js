// The program before and after, side by side: what is open, found, chosen and colored.

const SIDES = ["before", "after"];
const LABELS = { before: "Before", after: "After" };
const COLORS = {
  changes: "changes",
  local: "local error",
  cumulative: "cumulative error",
  own: "own error of the rewrite",
};
const LOUD_DB = 0; // colored fully
const QUIET_DB = 80; // not colored

const graphState = {
  expanded: new Set(), // keys of groups, the same on both sides
  order: [], // in which they were opened
  view: "both",
  constants: false,
  color: "changes",
  words: [],
  selected: null, // {side, name}
  hit: -1,
};
const sides = {}; // before, after -> {graph, byName, tree, places, canvas, haystacks, found}

function drawGraph() {
  const section = $("graph");
  if (!GRAPHS) {
    section.append(
      h("p", { class: "note" }, "This report was saved without its graphs. Save it with ", h("code", {}, "planish optimize MODEL --report report.html"), " or ", h("code", {}, "report.json"), " to have them."),
    );
    return;
  }
  const details = h("aside", { id: "details", "aria-label": "Chosen node", tabindex: "0" });
  const note = h("p", { id: "graph-note", class: "note", role: "status", hidden: true });
  for (const side of SIDES) {
    const graph = GRAPHS[side];
    sides[side] = {
      graph,
      byName: new Map(graph.nodes.map((node) => [node.name, node])),
      haystacks: new Map(graph.nodes.map((node) => [node.name, haystackOf(node, graph)])),
      found: new Set(),
      canvas: new Canvas(side, LABELS[side], handlersOf(side)),
    };
  }
  graphLinks.has = (name, side) => sideOf(name, side) !== null;
  graphLinks.show = (name, side) => showNode(name, sideOf(name, side));
  section.append(
    graphBar(),
    note,
    h("div", { class: "graphs", id: "graphs" }, SIDES.map((side) => sides[side].canvas.element), details),
    legend(),
  );
  plant();
  expandWhile(SIDES.map((side) => sides[side].tree), graphState.expanded, FIRST_BOXES);
  graphState.order = [...graphState.expanded];
  drawDetails();
  redraw();
  for (const side of SIDES) sides[side].canvas.fit();
  onPass(refreshAll);
}

function haystackOf(node, graph) {
  const parts = [node.name, node.id, node.operator, node.source, node.type];
  for (const path of node.modules) parts.push(path, graph.modules[path]);
  return parts.filter(Boolean).join("\n").toLowerCase();
}

function plant() {
  for (const side of SIDES) {
    const one = sides[side];
    one.tree = buildTree(one.graph, graphState.constants);
    one.places = placesOf(one.tree);
    one.groups = groupsOf(one.tree);
    one.nodesOf = new Map();
  }
}

// -- the bar ---------------------------------------------------------------------------------------

function graphBar() {
  const search = h("input", {
    type: "search",
    id: "graph-search",
    placeholder: "Search name, operator, source, module",
    "aria-label": "Search the graphs by name, operator, source line or module",
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => find(search.value),
    onkeydown: (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      nextHit(event.shiftKey ? -1 : 1);
    },
  });
  const button = (text, title, action, more = {}) =>
    h("button", { type: "button", title, onclick: action, ...more }, text);
  const views = ["both", ...SIDES].map((view) =>
    button(view === "both" ? "Both" : LABELS[view], `Show ${view}`, () => setView(view), {
      "data-view": view,
      "aria-pressed": String(view === graphState.view),
    }),
  );
  const constants = h("input", { type: "checkbox", id: "graph-constants", onchange: () => setConstants(constants.checked) });
  const color = h(
    "select",
    { id: "graph-color", onchange: () => setColor(color.value) },
    Object.entries(COLORS).map(([value, label]) => h("option", { value }, label)),
  );
  return h(
    "div",
    { class: "bar graphbar" },
    h("span", { class: "searchbox" }, search, h("span", { id: "graph-hits", class: "tally", role: "status" })),
    button("\u2191", "Previous match (Shift+Enter)", () => nextHit(-1)),
    button("\u2193", "Next match (Enter)", () => nextHit(1)),
    h("span", { class: "choice", role: "group", "aria-label": "Panels" }, views),
    button("Open changes", "Open the modules in which something changed", () => openWhere(changedGroup), { id: "open-changes" }),
    button("Open all", `Open modules, up to ${MOST_BOXES} boxes`, () => openWhere(() => true), { id: "open-all" }),
    button("Close all", "Close all modules", closeAll, { id: "close-all" }),
    h("label", { class: "check" }, constants, " constants"),
    ERRORS.length > 0 && h("label", { class: "check" }, "color by ", color),
  );
}

function legend() {
  const swatch = (status, label) => h("li", {}, h("span", { class: `swatch ${status}` }), label);
  return h(
    "div",
    { class: "legendbox" },
    h(
      "ul",
      { class: "legend" },
      swatch("removed", "removed"),
      swatch("added", "added"),
      swatch("edited", "edited in place"),
      swatch("kept", "kept"),
      swatch("declined", "a rule declined here"),
      ERRORS.length > 0 && h("li", {}, h("span", { class: "ramp" }), `error, from ${QUIET_DB} dB to ${LOUD_DB} dB SQNR`),
    ),
    h("p", { class: "hint" }, "Drag to move, Ctrl and the wheel to zoom. Keys in a panel: arrows go from box to box, Enter opens or chooses, Shift and arrows move, + \u2212 0 zoom."),
  );
}

function tell(sentence) {
  $("graph-note").textContent = sentence;
  $("graph-note").hidden = !sentence;
}

function setView(view) {
  graphState.view = view;
  $("graphs").dataset.view = view;
  for (const button of document.querySelectorAll("[data-view][aria-pressed]")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
  for (const side of SIDES) {
    sides[side].canvas.element.hidden = view !== "both" && view !== side;
    if (!sides[side].canvas.element.hidden) sides[side].canvas.fit();
  }
}

function setConstants(shown) {
  graphState.constants = shown;
  $("graph-constants").checked = shown;
  plant();
  keepWithin([]);
  redraw();
}

function setColor(color) {
  graphState.color = color;
  $("graph").classList.toggle("heated", color !== "changes");
  refreshAll();
}

// -- opening and closing ---------------------------------------------------------------------------

const changedGroup = (group_) =>
  chosen.pass === null
    ? group_.counts.kept < group_.size
    : leavesOf(group_).some((node) => SIDES.some((side) => sides[side].byName.get(node.name) === node && concerned(node, side)));

function openWhere(wanted) {
  const trees = SIDES.map((side) => sides[side].tree);
  // A module may be changed on one side only; it is opened on both.
  const keys = new Set(SIDES.flatMap((side) => sides[side].groups.filter(wanted).map((one) => one.key)));
  const left = expandWhile(trees, graphState.expanded, MOST_BOXES, (one) => keys.has(one.key));
  graphState.order = [...graphState.expanded];
  tell(left ? `At most ${MOST_BOXES} boxes are drawn at once in a panel: ${plural(left, "module")} stayed closed.` : "");
  redraw();
  for (const side of SIDES) sides[side].canvas.fit();
}

function closeAll() {
  graphState.expanded.clear();
  graphState.order = [];
  tell("");
  redraw();
  for (const side of SIDES) sides[side].canvas.fit();
}

function toggle(group_) {
  const { expanded } = graphState;
  const open = !expanded.has(group_.key);
  if (open) expanded.add(group_.key);
  else expanded.delete(group_.key);
  graphState.order = graphState.order.filter((key) => key !== group_.key);
  if (open) graphState.order.push(group_.key);
  keepWithin(ancestry(group_));
  redraw(`g${group_.key}`);
  const name = open ? "Collapse" : "Expand";
  for (const side of SIDES) {
    const again = [...sides[side].canvas.scene.querySelectorAll("[data-group]")].find(
      (one) => one.dataset.group === group_.key,
    );
    if (again && again.getAttribute("aria-label").startsWith(name)) again.focus({ preventScroll: true });
  }
}

function ancestry(group_) {
  const keys = [];
  for (let one = group_; one; one = one.parent) keys.push(one.key);
  return keys;
}

// Close what was opened longest ago until both panels are within their limit.
function keepWithin(spared) {
  const { expanded, order } = graphState;
  const over = () => SIDES.some((side) => boxCount(sides[side].tree, expanded) > MOST_BOXES);
  let closed = 0;
  for (const key of [...order]) {
    if (!over()) break;
    if (spared.includes(key)) continue;
    expanded.delete(key);
    closed += 1;
  }
  graphState.order = order.filter((key) => expanded.has(key));
  tell(closed ? `At most ${MOST_BOXES} boxes are drawn at once in a panel: ${plural(closed, "module")} opened earlier ${closed === 1 ? "was" : "were"} closed.` : "");
}

// -- drawing ---------------------------------------------------------------------------------------

function redraw(anchor = null) {
  for (const side of SIDES) {
    const { canvas, tree, graph } = sides[side];
    const old = anchor && canvas.layout.places.get(anchor);
    canvas.draw(visible(tree, graph, graphState.expanded));
    const now = old && canvas.layout.places.get(anchor);
    // What was clicked stays where it was.
    if (now) canvas.moveBy(now.left + now.width / 2 - old.left - old.width / 2, now.top - old.top);
  }
}

function refreshAll() {
  for (const side of SIDES) sides[side].canvas.refresh();
}

function nodesIn(item, side) {
  if (!item.isGroup) return [item];
  const { nodesOf } = sides[side];
  if (!nodesOf.has(item)) nodesOf.set(item, leavesOf(item));
  return nodesOf.get(item);
}

// Whether the chosen pass has anything to say of a node, of what it reads, or of what stands for it.
function concerned(node, side) {
  const touches = (rows) => (rows || []).some((row) => row.pass === chosen.pass);
  const named = (name) => [CHANGES_AT, REFUSALS_AT, ERRORS_AT].some((index) => touches(index.get(name)));
  return withConstants(node, side).some((one) => named(one.name)) || node.partners.some(named);
}

// A constant that is not drawn counts for the node that reads it.
function withConstants(node, side) {
  if (graphState.constants) return [node];
  const { byName } = sides[side];
  return [node, ...node.inputs.map((name) => byName.get(name)).filter((one) => one && one.kind === "constant")];
}

function heatOf(node, side, key) {
  let worst = null;
  const names = side === "after" ? withConstants(node, side).map((one) => one.name) : node.partners;
  for (const name of names) {
    for (const row of ERRORS_AT.get(name) || []) {
      const bad = inPass(row) ? badness(row.value[key]) : null;
      if (bad !== null && (worst === null || bad > worst)) worst = bad;
    }
  }
  if (worst === null || worst === 0) return worst;
  const db = -20 * Math.log10(worst);
  return Math.max(0.04, Math.min(1, (QUIET_DB - db) / (QUIET_DB - LOUD_DB)));
}

function handlersOf(side) {
  const isSelected = (node) =>
    graphState.selected && graphState.selected.side === side && graphState.selected.name === node.name;
  const isPartner = (node) =>
    graphState.selected && graphState.selected.side !== side && node.partners.includes(graphState.selected.name);
  return {
    toggle,
    pick: (node) => selectNode(node, side),
    selected: () => (graphState.selected && graphState.selected.side === side ? graphState.selected.name : null),
    heat: (item) => {
      if (graphState.color === "changes") return null;
      const found = nodesIn(item, side).map((node) => heatOf(node, side, graphState.color));
      const known = found.filter((value) => value !== null);
      return known.length ? Math.max(...known) : null;
    },
    classes: (item) => {
      const nodes = nodesIn(item, side);
      return [
        item.isGroup ? "group" : `node ${item.kind} ${item.status}`,
        nodes.some((node) => sides[side].found.has(node.name)) && "match",
        nodes.some(isSelected) && "selected",
        nodes.some(isPartner) && "partner",
        !item.isGroup && REFUSALS_AT.has(item.name) && "declined",
        chosen.pass !== null && !nodes.some((node) => concerned(node, side)) && "dim-box",
      ].filter(Boolean).join(" ");
    },
    title: (item) => {
      if (!item.isGroup) return `${item.id} = ${item.call}\n${item.type}${item.source ? `\n${item.source}` : ""}`;
      const parts = ["removed", "added", "edited"].filter((kind) => item.counts[kind]).map((kind) => `${item.counts[kind]} ${kind}`);
      return `${item.path || item.title}${item.kind ? ` (${item.kind})` : ""}: ${plural(item.size, "node")}${parts.length ? `, ${parts.join(", ")}` : ""}\nClick to open`;
    },
  };
}

// -- choosing and finding --------------------------------------------------------------------------

function selectNode(node, side) {
  graphState.selected = { side, name: node.name };
  drawDetails();
  refreshAll();
  const other = sides[side === "before" ? "after" : "before"].canvas;
  const partner = node.partners.map((name) => other.boxOf.get(name)).find(Boolean);
  if (partner) other.center(partner);
}

function drawDetails() {
  const pane = $("details");
  const { selected } = graphState;
  if (!selected) {
    clear(pane, h("p", { class: "none" }, "Choose a node to see its type, arguments, source line, the change that made or removed it, and what declined there."));
    return;
  }
  const { byName, graph } = sides[selected.side];
  clear(pane, nodeDetails(byName.get(selected.name), selected.side, graph));
  pane.scrollTop = 0;
}

// Where a name is to be shown: the wanted side, or the first that has it.
function sideOf(name, side) {
  const has = (one) => Boolean(sides[one]) && sides[one].byName.has(name);
  return (side ? [side] : SIDES).find(has) || null;
}

function showNode(name, side, { scroll = true } = {}) {
  const one = sides[side];
  const node = one.byName.get(name);
  if (node.kind === "constant" && !graphState.constants) setConstants(true);
  if (graphState.view !== "both" && graphState.view !== side) setView("both");
  const around = one.places.get(name) || [];
  for (const group_ of around) {
    if (!graphState.expanded.has(group_.key)) {
      graphState.expanded.add(group_.key);
      graphState.order.push(group_.key);
    }
  }
  keepWithin(around.map((group_) => group_.key));
  redraw();
  selectNode(node, side);
  one.canvas.center(`n${name}`);
  if (scroll) $("graphs").scrollIntoView({ block: "nearest" });
}

function find(text) {
  graphState.words = text.toLowerCase().split(/\s+/).filter(Boolean);
  graphState.hit = -1;
  for (const side of SIDES) {
    const one = sides[side];
    one.found = new Set();
    if (!graphState.words.length) continue;
    for (const [name, haystack] of one.haystacks) {
      if (graphState.words.every((word) => haystack.includes(word))) one.found.add(name);
    }
  }
  tellHits();
  refreshAll();
}

function tellHits() {
  const [before, after] = SIDES.map((side) => sides[side].found.size);
  const place = graphState.hit >= 0 ? `${graphState.hit + 1} of ${before + after}: ` : "";
  $("graph-hits").textContent = graphState.words.length ? `${place}${before} before, ${after} after` : "";
}

function nextHit(way) {
  const hits = SIDES.flatMap((side) => [...sides[side].found].map((name) => ({ side, name })));
  if (!hits.length) return;
  graphState.hit = graphState.hit < 0 && way < 0 ? hits.length - 1 : (graphState.hit + way + hits.length) % hits.length;
  const { side, name } = hits[graphState.hit];
  showNode(name, side, { scroll: false });
  tellHits();
}
