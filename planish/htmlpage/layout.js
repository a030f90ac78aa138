// Where everything goes. Every open module is laid out by itself with dagre, from the inside out, and
// is then one box of the module around it: opening a module moves nothing that is inside another.
//
// A value that enters a module, or leaves it, passes a port on its border, which is laid out like a
// node; so its line finds its way around the boxes within. A line is put together from its parts.

const TITLE = 24; // above what is inside a frame
const SIDE = 12;
const MARGIN = 18; // around the whole
const MOST_PORTS = 12; // further values share the last port of a frame

// view: of visible(). Gives places (id -> {left, top, width, height}), routes (edge -> points),
// and the size of the whole.
function layOut(view) {
  const frames = new Map(view.frames.map((frame) => [frame.id, frame]));
  const outer = new Map([...view.frames, ...view.boxes].map((part) => [part.id, part.frame]));
  const parts = new Map([[null, []]]);
  for (const { id } of view.frames) parts.set(id, []);
  for (const part of [...view.frames, ...view.boxes]) parts.get(part.frame).push(part);

  const local = new Map([...parts.keys()].map((id) => [id, { lines: new Map(), ports: new Map() }]));
  const pieces = new Map(view.edges.map((edge) => [edge, piecesOf(edge, outer, local)]));

  const done = new Map(); // frame -> what dagre made of it
  const place = (id) => {
    for (const part of parts.get(id)) if (frames.has(part.id)) place(part.id);
    done.set(id, layOutFrame(parts.get(id), local.get(id), done));
  };
  place(null);

  const places = new Map();
  const whole = done.get(null);
  const origins = new Map([[null, { x: MARGIN - whole.left, y: MARGIN - whole.top }]]);
  for (const id of [null, ...frames.keys()]) {
    // Frames are listed from the outside in.
    const origin = origins.get(id);
    const inside = done.get(id);
    for (const part of parts.get(id)) {
      const { x, y, width, height } = inside.graph.node(part.id);
      const [left, top] = [origin.x + x - width / 2, origin.y + y - height / 2];
      places.set(part.id, { left, top, width, height });
      if (!frames.has(part.id)) continue;
      const part_ = done.get(part.id);
      const room = (width - part_.width) / 2; // a title may be wider than what is inside
      origins.set(part.id, { x: left + room - part_.left, y: top + TITLE - part_.top });
    }
  }
  const routes = new Map();
  for (const [edge, list] of pieces) {
    routes.set(
      edge,
      list.flatMap(({ frame, line }) => {
        const { x, y } = origins.get(frame);
        const { points } = done.get(frame).graph.edge(line.from, line.to);
        return points.map((point) => ({ x: point.x + x, y: point.y + y }));
      }),
    );
  }
  return { places, routes, width: whole.width + 2 * MARGIN, height: whole.height + 2 * MARGIN };
}

// The frames around a part, from the inside out; null is the whole.
function around(id, outer) {
  const found = [];
  for (let frame = outer.get(id); ; frame = outer.get(frame)) {
    found.push(frame);
    if (frame === null) return found;
  }
}

// Cut an edge where it crosses frames: out of those around its beginning, across, and into those
// around its end. Every piece becomes a line of one frame.
function piecesOf({ from, to }, outer, local) {
  const [leaves, enters] = [around(from, outer), around(to, outer)];
  const common = leaves.find((frame) => enters.includes(frame));
  const pieces = [];
  let start = from;
  for (const frame of leaves.slice(0, leaves.indexOf(common))) {
    pieces.push(lineIn(frame, start, portOf(frame, "out", from, local), local));
    start = frame;
  }
  const inner = enters.slice(0, enters.indexOf(common)).reverse();
  pieces.push(lineIn(common, start, inner.length ? inner[0] : to, local));
  inner.forEach((frame, position) => {
    const next = position + 1 < inner.length ? inner[position + 1] : to;
    pieces.push(lineIn(frame, portOf(frame, "in", from, local), next, local));
  });
  return pieces;
}

function lineIn(frame, from, to, local) {
  const { lines } = local.get(frame);
  const key = `${from}\n${to}`;
  if (!lines.has(key)) lines.set(key, { from, to });
  return { frame, line: lines.get(key) };
}

// One port for everything that comes from one box.
function portOf(frame, way, source, local) {
  const { ports } = local.get(frame);
  const key = `${way}\n${source}`;
  if (!ports.has(key)) {
    const same = [...ports.values()].filter((port) => port.way === way);
    ports.set(key, same.length < MOST_PORTS ? { id: `port ${way} ${same.length}`, way } : same[same.length - 1]);
  }
  return ports.get(key).id;
}

function layOutFrame(members, { lines, ports }, done) {
  const graph = new dagre.graphlib.Graph();
  const how = { rankdir: "TB", nodesep: 20, ranksep: 30 };
  graph.setGraph(members.length > 60 ? { ...how, ranker: "tight-tree" } : how);
  graph.setDefaultEdgeLabel(() => ({}));
  for (const part of members) {
    const inside = done.get(part.id);
    const size = inside
      ? { width: Math.max(inside.width + 2 * SIDE, titleWidth(part.group)), height: inside.height + TITLE + SIDE }
      : sizeOf(part.item);
    graph.setNode(part.id, size);
  }
  for (const { id } of ports.values()) graph.setNode(id, { width: 2, height: 1 });
  for (const { from, to } of lines.values()) graph.setEdge(from, to, {});
  dagre.layout(graph);
  return { graph, ...boundsOf(graph) };
}

// dagre counts boxes only; lines may run around them.
function boundsOf(graph) {
  let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
  const add = (x, y, dx, dy) => {
    [left, top] = [Math.min(left, x - dx), Math.min(top, y - dy)];
    [right, bottom] = [Math.max(right, x + dx), Math.max(bottom, y + dy)];
  };
  for (const id of graph.nodes()) {
    const { x, y, width, height } = graph.node(id);
    add(x, y, width / 2, height / 2);
  }
  for (const edge of graph.edges()) for (const { x, y } of graph.edge(edge).points) add(x, y, 3, 0);
  if (left > right) return { left: 0, top: 0, width: 0, height: 0 };
  return { left, top, width: right - left, height: bottom - top };
}

const titleWidth = (group_) => Math.min(group_.title.length, 40) * 6.6 + 40;
