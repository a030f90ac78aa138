// One panel: draws what is visible as SVG that can be moved and scaled.

const NEAREST = 0.6; // a whole graph is not shown smaller than this; then its top is shown

function textWidth(text, perLetter) {
  return Math.min(text.length, 34) * perLetter;
}
const shorten = (text, most = 34) => (text.length > most ? `${text.slice(0, most - 1)}\u2026` : text);

function linesOf(item) {
  if (item.isGroup) {
    const kind = item.kind && item.kind !== "range" ? `${item.kind} \u00b7 ` : "";
    return [item.title, `${kind}${plural(item.size, "node")}`];
  }
  if (item.kind === "operator") return [item.operator.replace(/^aten\./, ""), `${item.id}: ${item.type}`];
  return [item.id, item.kind === "output" ? `output: ${item.type}` : `${item.kind}: ${item.type}`];
}

function sizeOf(item) {
  const [first, second] = linesOf(item);
  const width = Math.max(92, textWidth(first, 7.4) + 26, textWidth(second, 6) + 22);
  return { width, height: item.isGroup ? 52 : 40 };
}

// handlers: toggle(group), pick(node), title(item) -> string, classes(item) -> string
class Canvas {
  constructor(name, label, handlers) {
    this.name = name;
    this.handlers = handlers;
    this.scene = s("g", {});
    this.svg = s(
      "svg",
      { class: "canvas", id: `canvas-${name}`, role: "group", "aria-label": `${label}: graph`, tabindex: "0" },
      s(
        "defs",
        {},
        s(
          "marker",
          { id: `arrow-${name}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto" },
          s("path", { d: "M0 0L8 4L0 8z", class: "arrow" }),
        ),
      ),
      this.scene,
    );
    const tool = (text, title, action) =>
      h("button", { type: "button", title, "aria-label": `${title} (${label})`, onclick: action }, text);
    this.tally = h("span", { class: "tally" });
    this.element = h(
      "div",
      { class: "panel", id: `panel-${name}` },
      h(
        "div",
        { class: "panelbar" },
        h("h3", {}, label),
        this.tally,
        tool("\u2212", "Zoom out", () => this.zoom(1 / 1.3)),
        tool("+", "Zoom in", () => this.zoom(1.3)),
        tool("Fit", "Fit the graph", () => this.fit()),
      ),
      this.svg,
    );
    this.view = { x: 0, y: 0, scale: 1 };
    this.bind();
  }

  bind() {
    this.svg.addEventListener(
      "wheel",
      (event) => {
        // The wheel alone scrolls the page.
        if (!event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY / 300), this.toScene(event));
      },
      { passive: false },
    );
    let last = null;
    this.svg.addEventListener("pointerdown", (event) => {
      last = { x: event.clientX, y: event.clientY, far: 0 };
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (!last || !event.buttons) return;
      const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
      const far = last.far + Math.abs(dx) + Math.abs(dy);
      if (far > 4 && !this.svg.hasPointerCapture(event.pointerId)) this.svg.setPointerCapture(event.pointerId);
      last = { x: event.clientX, y: event.clientY, far };
      this.moveBy(-dx / this.view.scale, -dy / this.view.scale);
    });
    this.svg.addEventListener("pointerup", () => (last = null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.apply()).observe(this.svg);
  }

  // -- drawing ---------------------------------------------------------------------------------

  draw(view) {
    this.boxes = new Map(view.boxes.map((box) => [box.id, box]));
    this.boxOf = view.boxOf;
    this.layout = layOut(view);
    const parts = [
      ...view.frames.map((frame) => this.frame(frame)),
      ...view.edges.map((edge) => this.edge(edge)),
      ...view.boxes.map((box) => this.box(box)),
    ];
    this.scene.replaceChildren(...parts);
    this.tally.textContent = plural(view.boxes.length, "box", "boxes");
    this.element.dataset.boxes = view.boxes.length;
    this.refresh();
  }

  frame({ id, group: group_ }) {
    const place = this.layout.places.get(id);
    const { left, top } = place;
    const label = shorten(group_.title, Math.max(8, Math.floor(place.width / 7.5) - 3));
    return s(
      "g",
      { class: "frame" },
      s("rect", { x: left, y: top, width: place.width, height: place.height, rx: 8 }),
      s(
        "g",
        this.button(`Collapse ${group_.title}`, () => this.handlers.toggle(group_), { "data-group": group_.key }),
        s("title", {}, `Collapse ${group_.title} ${group_.kind}`),
        s("rect", { class: "grip", x: left + 4, y: top + 4, width: label.length * 6.6 + 24, height: 18, rx: 5 }),
        s("text", { x: left + 10, y: top + 17 }, `\u2212 ${label}`),
      ),
    );
  }

  edge(edge) {
    const { from, to, values } = edge;
    const points = this.layout.routes.get(edge);
    const [first, ...rest] = points;
    let d = `M${first.x} ${first.y}`;
    rest.forEach((point, position) => {
      const next = rest[position + 1];
      if (!next) d += `L${point.x} ${point.y}`;
      else d += `Q${point.x} ${point.y} ${(point.x + next.x) / 2} ${(point.y + next.y) / 2}`;
    });
    const path = s(
      "path",
      { class: "edge", d, "marker-end": `url(#arrow-${this.name})` },
      s("title", {}, values.slice(0, 12).join("\n") + (values.length > 12 ? `\nand ${values.length - 12} more` : "")),
    );
    path.ends = [from, to];
    return path;
  }

  button(label, action, more = {}) {
    return {
      role: "button",
      tabindex: "-1",
      "aria-label": label,
      onclick: () => action(),
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        action();
      },
      ...more,
    };
  }

  box({ id, item }) {
    const place = this.layout.places.get(id);
    const [first, second] = linesOf(item);
    const act = () => (item.isGroup ? this.handlers.toggle(item) : this.handlers.pick(item));
    const kind = item.isGroup ? "Expand" : item.kind;
    const names = item.isGroup ? { "data-group": item.key } : { "data-node": item.name };
    const element = s(
      "g",
      this.button(`${kind} ${first}, ${second}`, act, {
        ...names,
        transform: `translate(${place.left} ${place.top})`,
      }),
      s("title", {}, this.handlers.title(item)),
      s("rect", { class: "face", width: place.width, height: place.height, rx: item.isGroup ? 8 : 5 }),
      s("text", { class: "name", x: 10, y: 17 }, shorten(item.isGroup ? `+ ${first}` : first)),
      s("text", { class: "kind", x: 10, y: 32 }, shorten(second, 38)),
      item.isGroup && this.marks(item, place.width),
    );
    element.item = item;
    this.boxes.get(id).element = element;
    return element;
  }

  // How many nodes of a closed group were removed, added and edited, as one bar and in words.
  marks(group_, width) {
    const kinds = ["removed", "added", "edited"].filter((kind) => group_.counts[kind]);
    let x = 10;
    const room = width - 20;
    const bar = kinds.map((kind) => {
      const part = (room * group_.counts[kind]) / group_.size;
      const rect = s("rect", { class: `mark ${kind}`, x, y: 40, width: Math.max(3, part), height: 5, rx: 2 });
      x += Math.max(3, part) + 1;
      return rect;
    });
    return [s("rect", { class: "mark none", x: 10, y: 40, width: room, height: 5, rx: 2 }), ...bar];
  }

  // Classes depend on what is chosen, found and compared; the layout does not.
  refresh() {
    for (const box of this.boxes.values()) {
      box.element.setAttribute("class", `box ${this.handlers.classes(box.item)}`);
      const heat = this.handlers.heat(box.item);
      box.element.style.setProperty("--heat", heat === null ? "0" : String(heat));
    }
    const near = this.handlers.selected();
    const focus = near === null ? undefined : this.boxOf.get(near);
    for (const path of this.scene.querySelectorAll("path.edge")) {
      path.classList.toggle("near", focus !== undefined && path.ends.includes(focus));
    }
  }

  // -- moving ----------------------------------------------------------------------------------

  apply() {
    const { clientWidth: width, clientHeight: height } = this.svg;
    if (!width || !height) return;
    const { x, y, scale } = this.view;
    this.svg.setAttribute("viewBox", `${x} ${y} ${width / scale} ${height / scale}`);
  }

  moveBy(dx, dy) {
    this.view.x += dx;
    this.view.y += dy;
    this.apply();
  }

  toScene(event) {
    const frame = this.svg.getBoundingClientRect();
    return {
      x: this.view.x + (event.clientX - frame.left) / this.view.scale,
      y: this.view.y + (event.clientY - frame.top) / this.view.scale,
    };
  }

  zoom(factor, center = null) {
    const { clientWidth: width, clientHeight: height } = this.svg;
    const old = this.view.scale;
    const scale = Math.max(0.05, Math.min(4, old * factor));
    const hold = center || { x: this.view.x + width / old / 2, y: this.view.y + height / old / 2 };
    this.view.x = hold.x - ((hold.x - this.view.x) * old) / scale;
    this.view.y = hold.y - ((hold.y - this.view.y) * old) / scale;
    this.view.scale = scale;
    this.apply();
  }

  fit() {
    const { width, height } = this.layout;
    const { clientWidth, clientHeight } = this.svg;
    const whole = Math.min(clientWidth / width, clientHeight / height, 1.1);
    const scale = Math.max(whole, Math.min(NEAREST, 1));
    this.view = { scale, x: (width - clientWidth / scale) / 2, y: 0 };
    if (scale === whole) this.view.y = (height - clientHeight / scale) / 2;
    this.apply();
  }

  // Bring a box into the middle, at a readable size.
  center(id) {
    const place = this.layout.places.get(id);
    if (!place) return;
    this.view.scale = Math.max(this.view.scale, 0.8);
    const { clientWidth: width, clientHeight: height } = this.svg;
    this.view.x = place.left + place.width / 2 - width / this.view.scale / 2;
    this.view.y = place.top + place.height / 2 - height / this.view.scale / 2;
    this.apply();
  }

  // Arrow keys go from box to box; with Shift they move the graph.
  key(event) {
    const ways = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    const way = ways[event.key];
    if (event.key === "+" || event.key === "=") this.zoom(1.3);
    else if (event.key === "-") this.zoom(1 / 1.3);
    else if (event.key === "0") this.fit();
    else if (way && event.shiftKey) this.moveBy((way[0] * 80) / this.view.scale, (way[1] * 80) / this.view.scale);
    else if (way) this.step(way);
    else return;
    event.preventDefault();
  }

  step([dx, dy]) {
    const middle = ({ left, top, width, height }) => ({ x: left + width / 2, y: top + height / 2 });
    const here = [...this.boxes.values()].find((box) => box.element === document.activeElement);
    const from = here ? middle(this.layout.places.get(here.id)) : { x: this.view.x, y: this.view.y };
    let best = null;
    for (const box of this.boxes.values()) {
      const to = middle(this.layout.places.get(box.id));
      const along = here ? (to.x - from.x) * dx + (to.y - from.y) * dy : 1;
      if (box === here || along <= 0) continue;
      const cost = Math.hypot(to.x - from.x, to.y - from.y) * 2 - along;
      if (!best || cost < best.cost) best = { cost, box };
    }
    if (!best) return;
    best.box.element.focus({ preventScroll: true });
    this.center(best.box.id);
  }
}
