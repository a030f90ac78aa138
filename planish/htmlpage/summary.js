// What was optimized, and what came of it.

function drawHeader() {
  const name = DATA.model || "a model";
  $("model").textContent = name;
  document.title = `${name} \u2013 planish report`;
  const version = DATA.versions.planish;
  const button = h(
    "button",
    { type: "button", class: "link", onclick: () => copy(DATA.recipe, button, $("recipe-text")) },
    "Copy the recipe",
  );
  clear($("facts"), [
    h("span", {}, "for ", h("strong", {}, DATA.target)),
    h("span", {}, "seed ", number(["seed"], "plain")),
    version && h("span", {}, `planish ${version}`),
    button,
  ]);
}

function drawSummary() {
  const section = $("summary");
  section.append(
    h(
      "div",
      { class: "cards" },
      costCard("Parameters", "parameters", "prefixed"),
      costCard("Size of constants", "bytes", "bytes"),
      costCard("Multiply-accumulates", "macs", "prefixed"),
      fidelityCard(),
      workCard(),
    ),
    secondsBar(),
    versionsList(),
  );
}

function costCard(title, key, how) {
  const [before, after] = ["before", "after"].map((when) => at(["totals", when, key]));
  const largest = Math.max(before, after, 1);
  const bar = (when, value) =>
    h(
      "div",
      { class: "pair" },
      h("span", { class: "when" }, when),
      h("span", { class: "track" }, meter(value / largest, when)),
      number(["totals", when, key], how),
    );
  return h(
    "div",
    { class: "card" },
    h("h3", {}, title),
    h("p", { class: "big" }, number(["totals", "ratio", key], "percent", "none")),
    bar("before", before),
    bar("after", after),
  );
}

// A bar of a share from 0 to 1. The style of an element may be set by a script under the policy.
function meter(share, kind) {
  const element = h("span", { class: `meter ${kind}` });
  element.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return element;
}

function fidelityCard() {
  const found = DATA.fidelity;
  const rows = [
    ["cosine", "cosine", "cosine"],
    ["largest difference", "max_abs", "small"],
    ["relative L2 error", "rel_l2", "small"],
  ];
  return h(
    "div",
    { class: "card" },
    h("h3", {}, "Outputs against the original"),
    h("p", { class: "big" }, found ? sqnr(["fidelity"]) : "not compared"),
    found &&
      h(
        "dl",
        {},
        rows.map(([label, key, how]) => [h("dt", {}, label), h("dd", {}, number(["fidelity", key], how))]),
      ),
  );
}

function workCard() {
  return h(
    "div",
    { class: "card" },
    h("h3", {}, "Rewrites"),
    h("p", { class: "big" }, number(["totals", "changes"])),
    h(
      "dl",
      {},
      h("dt", {}, "declined"),
      h("dd", {}, number(["totals", "refusals"])),
      h("dt", {}, "passes"),
      h("dd", {}, count(["passes"])),
    ),
  );
}

function secondsBar() {
  const stages = Object.entries(DATA.totals.seconds).filter(([, value]) => typeof value === "number");
  const total = stages.reduce((sum, [, value]) => sum + value, 0);
  const share = (value) => (total ? value / total : 0);
  return h(
    "div",
    { class: "stages" },
    h("h3", {}, "Seconds by stage"),
    h(
      "div",
      { class: "stack", "aria-hidden": "true" },
      stages.map(([name, value], position) => {
        const part = h("span", { class: `part tone${position % 5}`, title: name });
        part.style.flexGrow = String(share(value));
        return part;
      }),
    ),
    h(
      "ul",
      { class: "legend" },
      stages.map(([name], position) =>
        h(
          "li",
          {},
          h("span", { class: `dot tone${position % 5}` }),
          `${name} `,
          number(["totals", "seconds", name], "seconds"),
        ),
      ),
    ),
  );
}

function versionsList() {
  const versions = Object.entries(DATA.versions);
  return h(
    "p",
    { class: "versions" },
    versions.map(([name, version]) => h("span", {}, `${name} `, h("b", {}, version))),
  );
}

function drawRemarks() {
  const section = $("remarks");
  const rows = [
    ...DATA.remarks.map((text) => ({ text, pass: null })),
    ...PASSES.flatMap((entry, pass) => entry.remarks.map((text) => ({ text, pass }))),
  ];
  const list = h("ul", { class: "remarks" });
  const draw = () => {
    const shown = rows.filter((row) => chosen.pass === null || row.pass === chosen.pass);
    clear(
      list,
      shown.map((row) =>
        h("li", {}, row.pass !== null && [passButton(row.pass), " "], h("span", {}, row.text)),
      ),
    );
    if (!shown.length) {
      list.append(h("li", { class: "none" }, rows.length ? "No remark on this pass." : "No remarks."));
    }
  };
  section.append(list);
  onPass(draw);
  draw();
}
