// A table that can be sorted and filtered. It draws a part of its rows and says how many there are.

const PAGE_ROWS = 100;

// columns: {title, cell(row) -> node or text, sort(row) -> number or string, text(row) -> string,
//           align, hint}. A row is shown if it is in the chosen pass and holds all typed words.
function table({ id, rows, columns, label, sorted = null, descending = false }) {
  const view = { shown: PAGE_ROWS, sorted, descending, words: [], extra: () => true };
  const words = (row) =>
    (row.words ??= columns
      .map((column) => (column.text ? column.text(row) : ""))
      .join(" ")
      .toLowerCase());
  const input = h("input", {
    type: "search",
    id: `${id}-filter`,
    placeholder: `Filter ${label}`,
    "aria-label": `Filter ${label}`,
    autocomplete: "off",
    spellcheck: "false",
    oninput: () => {
      view.words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      view.shown = PAGE_ROWS;
      draw();
    },
  });
  const tally = h("span", { class: "tally", role: "status" });
  const body = h("tbody", { id: `${id}-rows` });
  const more = h("button", {
    type: "button",
    class: "more",
    onclick: () => {
      view.shown += 5 * PAGE_ROWS;
      draw();
    },
  });
  const heads = columns.map((column, position) => {
    const content = column.sort
      ? h(
          "button",
          {
            type: "button",
            title: column.hint || `Sort by ${column.title}`,
            onclick: () => {
              view.descending = view.sorted === position ? !view.descending : Boolean(column.largest);
              view.sorted = position;
              draw();
            },
          },
          column.title,
        )
      : column.title;
    return h("th", { scope: "col", class: column.align, title: column.hint }, content);
  });

  function compare(one, other) {
    const sort = columns[view.sorted].sort;
    const [a, b] = [sort(one), sort(other)];
    const [missingA, missingB] = [a === null || a === undefined, b === null || b === undefined];
    if (missingA || missingB) return missingA - missingB; // what was not measured comes last
    const order = typeof a === "string" ? a.localeCompare(b) : a < b ? -1 : a > b ? 1 : 0;
    return view.descending ? -order : order;
  }

  function draw() {
    const inScope = rows.filter((row) => inPass(row) && view.extra(row));
    const found = inScope.filter((row) => view.words.every((word) => words(row).includes(word)));
    if (view.sorted !== null) found.sort(compare);
    heads.forEach((head, position) => {
      if (view.sorted !== position) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
    });
    const drawn = found.slice(0, view.shown);
    clear(
      body,
      drawn.map((row) =>
        h("tr", {}, columns.map((column) => h("td", { class: column.align }, column.cell(row)))),
      ),
    );
    if (!found.length) {
      const why = "Nothing matches the filter.";
      body.append(h("tr", {}, h("td", { class: "none", colspan: columns.length }, why)));
    }
    tally.textContent =
      found.length === rows.length
        ? format.whole(rows.length)
        : `${format.whole(found.length)} of ${format.whole(rows.length)}`;
    more.hidden = drawn.length === found.length;
    more.textContent = `Show more: ${format.whole(drawn.length)} of ${format.whole(found.length)} rows are drawn`;
  }

  onPass(() => {
    view.shown = PAGE_ROWS;
    draw();
  });
  draw();
  const bar = h("div", { class: "bar" }, input, tally);
  const element = h(
    "div",
    { class: "tablebox" },
    bar,
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
      h("table", { id: `${id}-table` }, h("thead", {}, h("tr", {}, heads)), body),
    ),
    more,
  );
  return { element, bar, draw, view, input };
}
