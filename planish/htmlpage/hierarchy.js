// A graph as a tree of modules, and what of it is to be drawn: pure functions on plain data.

const MOST_CHILDREN = 80; // a module with more is cut into ranges
const RANGE = 50;
const MOST_BOXES = 400; // drawn at once, per panel
const FIRST_BOXES = 40; // drawn when the page opens

// Groups are {key, path, title, kind, parent, children, size, counts}; children hold groups and nodes.
function buildTree(graph, withConstants) {
  const root = newGroup("", "", null);
  const groups = new Map([["", root]]);
  const readers = withConstants ? readersOf(graph) : new Map();
  for (const node of graph.nodes) {
    if (!withConstants && node.kind === "constant") continue;
    let parent = root;
    for (const path of stackOf(node, readers)) {
      const key = `${parent.key}>${path}`;
      if (!groups.has(key)) {
        const group_ = newGroup(key, titleOf(path, parent), parent);
        group_.path = path;
        group_.kind = graph.modules[path] || "";
        groups.set(key, group_);
        parent.children.push(group_);
      }
      parent = groups.get(key);
    }
    parent.children.push(node);
  }
  tidy(root);
  return root;
}

// A constant stands with the first node that reads it, unless it knows better.
const stackOf = (node, readers) =>
  node.modules.length || node.kind !== "constant" ? node.modules : (readers.get(node.name) || node).modules;

function readersOf(graph) {
  const readers = new Map();
  for (const node of graph.nodes) {
    for (const name of node.inputs) if (!readers.has(name)) readers.set(name, node);
  }
  return readers;
}

const newGroup = (key, title, parent) => ({ key, path: "", title, kind: "", parent, children: [], isGroup: true });

// "layer.0" for "encoder.layer.0" inside "encoder".
function titleOf(path, parent) {
  return parent.path && path.startsWith(`${parent.path}.`) ? path.slice(parent.path.length + 1) : path;
}

// Modules of one node stand as that node, long lists are cut, and counts are added up.
function tidy(group_) {
  group_.children = group_.children.map((child) => {
    if (!child.isGroup) return child;
    tidy(child);
    if (child.size === 1) return leavesOf(child)[0];
    return child.children.length === 1 ? merged(child, child.children[0]) : child;
  });
  for (const child of group_.children) if (child.isGroup) child.parent = group_;
  while (group_.children.length > MOST_CHILDREN) cut(group_);
  const leaves = leavesOf(group_);
  group_.size = leaves.length;
  group_.counts = { added: 0, removed: 0, edited: 0, kept: 0 };
  for (const node of leaves) group_.counts[node.status] += 1;
}

// A module that holds nothing but another one is drawn as one.
function merged(outer, inner) {
  inner.title = `${outer.title}.${inner.title}`;
  return inner;
}

function cut(group_) {
  const ranges = [];
  for (let start = 0; start < group_.children.length; start += RANGE) {
    const range = newGroup(`${group_.key}#${start}/${group_.children.length}`, "", group_);
    range.children = group_.children.slice(start, start + RANGE);
    for (const child of range.children) if (child.isGroup) child.parent = range;
    const first = leavesOf(range)[0];
    range.title = `from ${first.id}`;
    range.kind = "range";
    tidy(range);
    ranges.push(range);
  }
  group_.children = ranges;
}

function leavesOf(group_) {
  return group_.children.flatMap((child) => (child.isGroup ? leavesOf(child) : [child]));
}

function groupsOf(group_) {
  return group_.children.filter((child) => child.isGroup).flatMap((child) => [child, ...groupsOf(child)]);
}

// Node name -> the groups around it, from the outermost in.
function placesOf(root) {
  const places = new Map();
  const walk = (group_, around) => {
    for (const child of group_.children) {
      if (child.isGroup) walk(child, [...around, child]);
      else places.set(child.name, around);
    }
  };
  walk(root, []);
  return places;
}

function boxCount(group_, expanded) {
  let boxes = 0;
  for (const child of group_.children) {
    boxes += child.isGroup && expanded.has(child.key) ? boxCount(child, expanded) : 1;
  }
  return boxes;
}

// Expand level by level, the smallest modules first, for as long as there is room.
function expandWhile(roots, expanded, limit, wanted = () => true) {
  let refused = 0;
  let level = roots.flatMap((root) => root.children.filter((child) => child.isGroup));
  while (level.length) {
    const next = [];
    for (const group_ of level.filter(wanted).sort((a, b) => a.children.length - b.children.length)) {
      if (!expanded.has(group_.key)) {
        expanded.add(group_.key);
        if (roots.some((root) => boxCount(root, expanded) > limit)) {
          expanded.delete(group_.key);
          refused += 1;
          continue;
        }
      }
      next.push(...group_.children.filter((child) => child.isGroup));
    }
    level = next;
  }
  return refused;
}

// What to draw: boxes (nodes and closed groups), frames (open groups) and edges between boxes.
function visible(root, graph, expanded) {
  const boxes = [];
  const frames = [];
  const boxOf = new Map();
  const walk = (group_, frame) => {
    for (const child of group_.children) {
      const id = child.isGroup ? `g${child.key}` : `n${child.name}`;
      if (child.isGroup && expanded.has(child.key)) {
        frames.push({ id, group: child, frame });
        walk(child, id);
        continue;
      }
      boxes.push({ id, item: child, frame });
      for (const node of child.isGroup ? leavesOf(child) : [child]) boxOf.set(node.name, id);
    }
  };
  walk(root, null);
  return { boxes, frames, boxOf, edges: edgesOf(graph, boxOf) };
}

function edgesOf(graph, boxOf) {
  const edges = new Map();
  const types = new Map(graph.nodes.map((node) => [node.name, node.type]));
  for (const node of graph.nodes) {
    const to = boxOf.get(node.name);
    if (to === undefined) continue;
    for (const input of node.inputs) {
      const from = boxOf.get(input);
      if (from === undefined || from === to) continue;
      const key = `${from}\n${to}`;
      if (!edges.has(key)) edges.set(key, { from, to, values: [] });
      edges.get(key).values.push(`${input}: ${types.get(input)}`);
    }
  }
  return [...edges.values()];
}
