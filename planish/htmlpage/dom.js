// Elements and text. Text from the report goes through textContent or setAttribute only.

const SVG = "http://www.w3.org/2000/svg"; // the name of a namespace; nothing is loaded

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
const $ = (id) => document.getElementById(id);

function clear(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child));
  return element;
}

// -- numbers for people ------------------------------------------------------------------------

function prefixed(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${(value / size).toFixed(value / size < 10 ? 2 : 1)} ${unit}`;
  }
  return `${value}`;
}

const format = {
  plain: (value) => String(value),
  whole: (value) => Number(value).toLocaleString("en-US"),
  prefixed,
  bytes: (value) => `${prefixed(value)}${Math.abs(value) < 1000 ? " " : ""}B`,
  seconds: (value) =>
    value >= 1 ? `${value.toFixed(2)} s` : value >= 1e-4 ? `${(1e3 * value).toFixed(1)} ms` : "0 ms",
  db: (value) => `${value.toFixed(1)} dB`,
  small: (value) =>
    value === 0 ? "0" : Math.abs(value) >= 0.01 && Math.abs(value) < 1e4 ? value.toPrecision(3) : value.toExponential(2),
  cosine: (value) => value.toFixed(6),
  percent: (ratio) => {
    const change = 100 * (ratio - 1);
    if (change === 0) return "unchanged";
    const digits = Math.abs(change) < 0.1 ? 3 : 1;
    return `${change < 0 ? "\u2212" : "+"}${Math.abs(change).toFixed(digits)} %`;
  },
};

const plural = (count, one, many) => `${format.whole(count)} ${count === 1 ? one : many || one + "s"}`;

// The last parts of a source line's path; the whole stands in the title.
function source(text) {
  if (!text) return h("span", { class: "dim" }, "\u2013");
  const found = /^(.*?):(\d+): ?([^]*)$/.exec(text);
  if (!found) return h("code", { class: "source", title: text }, text);
  const file = found[1].split("/").slice(-2).join("/");
  return h(
    "span",
    { class: "source", title: text },
    h("span", { class: "dim" }, `${file}:${found[2]} `),
    h("code", {}, found[3]),
  );
}

async function copy(text, button, where) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // A browser may deny the clipboard to a file; the text is selected for the reader to copy.
    getSelection().selectAllChildren(where);
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => (button.textContent = label), 2000);
}
