// The passes in order. Choosing one filters the rest of the page to it.

const idle = (entry) =>
  entry.ran !== false && !entry.changes.length && !entry.refusals.length && !entry.remarks.length;

// Before the pass: what the pass before it left.
const bytesBefore = (index) => (index ? PASSES[index - 1].bytes : DATA.totals.before.bytes);

function localPath(index) {
  // Reports hold the local error as an object, or as two flat values.
  return PASSES[index].fidelity ? ["passes", index, "fidelity"] : ["passes", index];
}

function drawTimeline() {
  const section = $("passes");
  const quiet = PASSES.filter(idle).length;
  const state = { hide: quiet > 0 && quiet < PASSES.length };
  const list = h("tbody", { id: "timeline" });
  const toggle = h("input", {
    type: "checkbox",
    id: "hide-idle",
    checked: state.hide,
    onchange: () => {
      state.hide = toggle.checked;
      draw();
    },
  });
  const slowest = Math.max(...PASSES.map((entry) => entry.seconds), 1e-9);
  const heads = [
    ["", "right"],
    ["pass"],
    ["changes", "right"],
    ["declined", "right"],
    ["time"],
    ["local error", "right", "Outputs against the program before the pass"],
    ["cumulative", "right", "Outputs against the original program"],
    ["size after", "right"],
    ["MACs after", "right"],
  ];

  function draw() {
    const shown = PASSES.map((_, index) => index).filter(
      (index) => !state.hide || !idle(PASSES[index]) || chosen.pass === index,
    );
    clear(list, shown.map((index) => timelineRows(index, slowest)));
    if (!shown.length) {
      list.append(h("tr", {}, h("td", { class: "none", colspan: heads.length }, "No pass ran.")));
    }
  }

  section.append(
    h(
      "p",
      { class: "hint" },
      "Choose a pass to filter the rest of the page to it. ",
      quiet > 0 &&
        h(
          "label",
          { class: "check" },
          toggle,
          ` Hide ${plural(quiet, "pass", "passes")} that found nothing to do`,
        ),
    ),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Passes" },
      h(
        "table",
        { class: "timeline" },
        h(
          "thead",
          {},
          h("tr", {}, heads.map(([title, align, hint]) => h("th", { scope: "col", class: align, title: hint }, title))),
        ),
        list,
      ),
    ),
  );
  onPass(draw);
  draw();
}

function timelineRows(index, slowest) {
  const entry = PASSES[index];
  const selected = chosen.pass === index;
  const path = ["passes", index];
  const name = h(
    "button",
    {
      type: "button",
      class: "pass",
      "aria-pressed": String(selected),
      "data-pass": index,
      onclick: (event) => {
        event.stopPropagation();
        choosePass(index);
        document.querySelector(`button.pass[data-pass="${index}"]`).focus();
      },
    },
    entry.name,
  );
  const bar = h(
    "span",
    { class: "track", title: `${entry.seconds} s` },
    meter(entry.seconds / slowest, entry.contract === "lossy" ? "lossy" : "exact"),
  );
  const row = h(
    "tr",
    {
      class: [selected && "selected", idle(entry) && "idle"].filter(Boolean).join(" ") || null,
      onclick: () => getSelection().isCollapsed && choosePass(index),
    },
    h("td", { class: "right dim" }, index + 1),
    h("td", {}, name, " ", badge(entry.contract), entry.ran === false && [" ", badge("left out")]),
    h("td", { class: "right" }, count([...path, "changes"])),
    h("td", { class: "right" }, count([...path, "refusals"])),
    h("td", {}, h("div", { class: "time" }, bar, number([...path, "seconds"], "seconds"))),
    h("td", { class: "right" }, sqnr(localPath(index))),
    h("td", { class: "right" }, sqnr([...path, "cumulative"])),
    h("td", { class: "right" }, trend(bytesBefore(index), entry.bytes), number([...path, "bytes"], "bytes")),
    h("td", { class: "right" }, number([...path, "macs"], "prefixed")),
  );
  return selected ? [row, passDetails(entry, index)] : [row];
}

const badge = (text) =>
  h("span", { class: `badge ${text === "lossy" ? "lossy" : "plain"}` }, text);

function trend(before, after) {
  if (before === after) return null;
  const less = after < before;
  const title = `${less ? "smaller" : "larger"} than before the pass`;
  return h("span", { class: less ? "good" : "bad", title }, less ? "\u25be " : "\u25b4 ");
}

// All that was measured of the outputs, in one line.
function fidelityLine(path) {
  const rest = [["cosine", "cosine"], ["rel_l2", "small"], ["max_abs", "small"]];
  const labels = { cosine: "cosine", rel_l2: "relative L2", max_abs: "largest difference" };
  return ["SQNR ", sqnr(path), rest.map(([key, how]) => [`, ${labels[key]} `, number([...path, key], how)])];
}

function passDetails(entry, index) {
  const rules = new Map();
  for (const change of entry.changes) rules.set(change.rule, (rules.get(change.rule) || 0) + 1);
  return h(
    "tr",
    { class: "about" },
    h("td", {}),
    h(
      "td",
      { colspan: 8 },
      h(
        "dl",
        {},
        h("dt", {}, "options"),
        h("dd", {}, entry.options ? h("code", {}, entry.options) : "all at their defaults"),
        rules.size > 0 && [
          h("dt", {}, "rules"),
          h(
            "dd",
            {},
            [...rules].map(([rule, times]) => h("span", { class: "tag" }, `${rule} \u00d7 ${times}`)),
          ),
        ],
        [["fidelity", "local error"], ["cumulative", "cumulative"]].map(
          ([key, label]) =>
            entry[key] && [h("dt", {}, label), h("dd", {}, fidelityLine(["passes", index, key]))],
        ),
        entry.remarks.map((text) => [h("dt", {}, "remark"), h("dd", {}, text)]),
      ),
    ),
  );
}
