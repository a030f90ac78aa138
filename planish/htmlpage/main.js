// Draws the page.

const SECTIONS = [
  ["summary", "Summary"],
  ["remarks", "Remarks"],
  ["passes", "Passes"],
  ["graph", "Graph"],
  ["accuracy", "Accuracy"],
  ["changes", "Changes"],
  ["refusals", "Refusals"],
  ["runtime", "Runtime"],
  ["recipe", "Recipe"],
];

function drawNav() {
  const links = new Map(
    SECTIONS.map(([id, title]) => [id, h("a", { href: `#${id}` }, title)]),
  );
  clear($("links"), [...links.values()].map((link) => h("li", {}, link)));
  const seen = new Set();
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target.id);
      const first = SECTIONS.map(([id]) => id).find((id) => seen.has(id));
      for (const [id, link] of links) link.classList.toggle("here", id === first);
    },
    { rootMargin: "-20% 0px -60% 0px" },
  );
  for (const [id] of SECTIONS) watcher.observe($(id));
}

function drawChosen() {
  const box = $("chosen");
  if (chosen.pass === null) {
    clear(box);
    return;
  }
  clear(
    box,
    h(
      "button",
      { type: "button", class: "chip", id: "clear-pass", title: "Show all passes again", onclick: () => choosePass(chosen.pass) },
      `Only pass ${chosen.pass + 1}, ${PASSES[chosen.pass].name} `,
      h("span", { "aria-hidden": "true" }, "\u00d7"),
    ),
  );
}

drawHeader();
drawNav();
drawSummary();
drawSparsity();
drawRemarks();
drawTimeline();
drawGraph();
drawAccuracy();
drawChanges();
drawRefusals();
drawRuntime();
drawRecipe();
onPass(drawChosen);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen.pass !== null) choosePass(chosen.pass);
});
// How long it took is told to whoever asks, and is no part of the report.
document.documentElement.dataset.readyMs = String(Math.round(performance.now()));
