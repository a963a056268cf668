// The page of `dllm-eval report`: table and completions here, plots and player in the files that follow in the page.
// Prompts and completions are untrusted: data only ever becomes text nodes and attributes that hold no code.

const data = JSON.parse(document.getElementById("data").textContent);
const id = (name) => document.getElementById(name);

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const known = (x) => x !== null && x !== undefined;
const fixed = (x, digits) => (known(x) ? x.toFixed(digits) : "–");
const colour = (cell) => `var(--s${cell.family % 10})`;
const badge = (right) => html("span", { class: `badge ${right ? "right" : "wrong"}` }, right ? "✓ right" : "✗ wrong");

function choices(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => html("option", { value }, text)));
  select.value = String(chosen);
}

// The table. A column: name, value of a cell to sort by, and of a figure its digits, scale, interval and whether the
// most is best. Settings that are words stand before the figures, numbers after them.

function columns() {
  const ks = [...new Set(data.cells.flatMap((cell) => Object.keys(cell.summary.pass_at_k ?? {})))]
    .filter((k) => Number(k) > 1)
    .sort((a, b) => a - b);
  const number = (name, key, digits, more = {}) => ({
    name,
    value: (cell) => cell.summary[key],
    interval: (cell) => cell.summary[`${key}_interval`],
    digits,
    ...more,
  });
  const settings = data.columns.map((name, i) => ({ name, value: (cell) => cell.values[i] }));
  const all = [
    { name: "sampler", value: (cell) => cell.short },
    ...settings.filter(word),
    number("accuracy %", "accuracy", 1, { scale: 100, best: 1 }),
    number("NFE", "nfe", 2),
    number("tokens / forward", "tokens_per_forward", 2),
    number("reward", "reward", 3, { best: 1 }),
    ...ks.map((k) => ({
      name: `pass@${k} %`,
      value: (cell) => cell.summary.pass_at_k?.[k],
      digits: 1,
      scale: 100,
      best: 1,
    })),
    number("response tokens / s", "tokens_per_second", 0),
    number("entropy", "entropy", 2),
    // Of one sample it says nothing.
    { ...number("distinct", "distinct", 3), value: (cell) => (cell.passes.length > 1 ? cell.summary.distinct : null) },
    ...settings.filter((column) => !word(column)),
  ];
  return all.filter((column) => column.digits === undefined || data.cells.some((cell) => known(column.value(cell))));
}
const word = (column) =>
  column.digits === undefined && data.cells.some((cell) => Number.isNaN(Number(column.value(cell))));

function table() {
  const all = columns();
  const heads = all.map((column) =>
    html(
      "th",
      { scope: "col", class: word(column) ? "name" : null },
      html("button", { onclick: () => sort(column) }, column.name.replaceAll(/ (?=[%/])|(?<=\/) /g, "\u00a0")),
    ),
  );
  const body = html("tbody");
  id("table").append(html("thead", {}, html("tr", {}, ...heads)), body);
  const rows = new Map(data.cells.map((cell) => [cell, row(cell)]));
  let sorted = null;
  let falling = false;

  function best(column, cell) {
    const rivals = data.cells
      .filter((other) => other.group === cell.group)
      .map(column.value)
      .filter(known);
    return column.best && rivals.length > 1 && column.value(cell) === Math.max(...rivals);
  }
  function entry(column, cell, i) {
    const value = column.value(cell);
    if (i === 0) {
      const dot = html("span", { class: "dot", "--c": colour(cell) });
      const notes = [cell.partial, cell.undecided].filter(Boolean).map((note) => html("small", {}, note));
      return html("th", { scope: "row", title: cell.sampler }, dot, value, ...notes);
    }
    if (column.digits === undefined) return html("td", { class: word(column) ? "name" : null }, value);
    if (!known(value)) return html("td", {}, "–");
    const text = (x) => fixed(x * (column.scale ?? 1), column.digits);
    const interval = column.interval?.(cell);
    return html(
      "td",
      {},
      best(column, cell) ? html("b", {}, text(value)) : text(value),
      interval ? html("small", {}, `[${interval.map(text).join(", ")}]`) : null,
    );
  }
  function row(cell) {
    return html("tr", {}, ...all.map((column, i) => entry(column, cell, i)));
  }
  function sort(column) {
    falling = sorted === column ? !falling : column.digits !== undefined;
    sorted = column;
    const order = [...data.cells].sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (!known(x) || !known(y)) return known(y) - known(x);
      const rising =
        typeof x === "number" && typeof y === "number"
          ? x - y
          : String(x).localeCompare(String(y), "en", { numeric: true });
      return falling ? -rising : rising;
    });
    heads.forEach((head, i) => {
      if (all[i] === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    body.replaceChildren(...order.map((cell) => rows.get(cell)));
  }
  body.append(...rows.values());
  id("shared").append(
    ...data.shared.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, String(value)))),
  );
}

// The completions: a filter gives the indices, and the next forty are drawn when the end of the list comes near.

function completions() {
  const [CELL, PROMPT, TEXT, RIGHT, NFE, REWARD] = [0, 1, 2, 3, 4, 5];
  const rows = data.completions;
  const list = id("list");
  let matches = [];
  let drawn = 0;
  choices(id("of"), [["", "all"], ...data.cells.map((cell, i) => [i, cell.name])], "");

  function item(row) {
    const cell = data.cells[row[CELL]];
    const [problem, prompt] = data.prompts[row[PROMPT]];
    const summary = html(
      "summary",
      {},
      badge(row[RIGHT]),
      html("span", { class: "id", title: problem }, problem),
      html("span", { title: cell.name }, html("span", { class: "dot", "--c": colour(cell) }), cell.label),
      html("span", { class: "nfe" }, `NFE ${row[NFE]}`),
      html("code", {}, row[TEXT].slice(0, 240)),
    );
    const details = html("details", {}, summary);
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return;
      const part = (name, text) => [html("h4", {}, name), html("pre", {}, text)];
      const settings = html("h4", {}, `${cell.sampler} · reward ${fixed(row[REWARD], 3)}`);
      details.append(
        html("div", { class: "body" }, ...part("Prompt", prompt), ...part("Completion", row[TEXT]), settings),
      );
    });
    return html("li", {}, details);
  }
  function more() {
    list.append(...matches.slice(drawn, drawn + 40).map((i) => item(rows[i])));
    drawn = Math.min(drawn + 40, matches.length);
  }
  function filter() {
    const [of, verdict, text] = ["of", "verdict", "text"].map((name) => id(name).value.toLowerCase());
    matches = [];
    rows.forEach((row, i) => {
      if (of && row[CELL] !== Number(of)) return;
      if (verdict && row[RIGHT] !== (verdict === "right")) return;
      if (text && ![row[TEXT], ...data.prompts[row[PROMPT]]].some((part) => part.toLowerCase().includes(text))) return;
      matches.push(i);
    });
    const [found, listed, all] = [matches.length, rows.length, data.completions_total].map((n) =>
      n.toLocaleString("en"),
    );
    id("count").textContent = `${found} of ${listed} completions${listed === all ? "" : `; ${all} were evaluated`}`;
    list.replaceChildren();
    drawn = 0;
    more();
  }
  for (const name of ["of", "verdict", "text"]) id(name).addEventListener("input", filter);
  new IntersectionObserver((seen) => seen[0].isIntersecting && more(), { rootMargin: "800px" }).observe(id("rest"));
  // An observer speaks when the end comes into view, not while it stays there: fast scrolling needs a second look.
  const near = () => id("rest").getBoundingClientRect().top < innerHeight + 800;
  addEventListener("scroll", () => near() && more(), { passive: true });
  filter();
}

id("title").textContent = data.title;
id("subtitle").textContent = data.subtitle;
id("footer").textContent =
  `Written by dllm-gym ${data.version}. Everything is in this file; it asks nothing of a network.`;
