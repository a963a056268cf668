// The player: one problem, two samplers, one scrubber.

const STOPS = [
  [0, 156, 48, 10],
  [0.35, 236, 142, 62],
  [0.6, 247, 222, 170],
  [0.8, 156, 203, 232],
  [1, 31, 104, 184],
];

// Orange (unsure) to blue (sure): told apart by every kind of colour vision, and alike on light and dark.
function shade(confidence) {
  const c = Math.min(Math.max(confidence, 0), 1);
  const above = STOPS.findIndex(([at], i) => i && c <= at);
  const [a, b] = [STOPS[above - 1], STOPS[above]];
  const t = (c - a[0]) / (b[0] - a[0]);
  return [1, 2, 3].map((j) => Math.round(a[j] + t * (b[j] - a[j])));
}
function ink(rgb) {
  const [r, g, b] = rgb.map((v) => ((v / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#10131a" : "#ffffff";
}
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").trim() || "·";
const isEnd = (text) => /^<\/?\|?\w+\|?>$/.test(text.trim());

function pane(film, name) {
  const cell = data.cells[film.cell];
  const steps = Math.max(0, ...film.step_of);
  const tokens = film.tokens.map((text, i) => {
    const rgb = shade(film.confidence[i] ?? 0);
    const kinds = [isEnd(text) && "end", i && cell.block_length && i % cell.block_length === 0 && "block"];
    const about = {
      class: ["token", ...kinds.filter(Boolean)].join(" "),
      "--fill": `rgb(${rgb})`,
      "--text": ink(rgb),
      title: `confidence ${fixed(film.confidence[i], 3)}, step ${film.step_of[i]}`,
    };
    const when = html("sup", { "aria-hidden": "true" }, String(film.step_of[i]));
    return html("span", about, html("span", {}, visible(text)), when);
  });
  const lineEnd = (i) => (film.tokens[i].includes("\n") ? [html("span", { class: "break" })] : []);
  const canvas = html("div", { class: tokens.length > 160 ? "canvas dense" : "canvas" });
  canvas.append(...tokens.flatMap((token, i) => [token, ...lineEnd(i)]));
  const state = html("span", { class: "state" });
  const verdict = html("span");
  const bar = html("i");
  const heading = html("h3", {}, html("span", { class: "dot", "--c": colour(cell) }), name);
  const node = html("article", { class: "pane", "aria-label": name });
  node.append(html("header", {}, heading, verdict, state), html("div", { class: "bar" }, bar), canvas);

  function at(step) {
    const now = Math.min(step, steps);
    const done = step >= steps;
    let written = 0;
    tokens.forEach((token, i) => {
      const on = film.step_of[i] > 0 && film.step_of[i] <= now;
      written += on;
      token.classList.toggle("masked", !on);
      token.classList.toggle("fresh", on && film.step_of[i] === step);
      token.setAttribute("aria-hidden", String(!on));
    });
    bar.style.width = `${(100 * written) / tokens.length}%`;
    state.textContent = `step ${now} of ${steps} · ${written} of ${tokens.length} tokens · NFE ${film.nfe}`;
    verdict.replaceChildren(done ? badge(film.correct) : html("span", { class: "badge" }, "decoding"));
    return `${name}: ${written} of ${tokens.length} tokens${done ? (film.correct ? ", right" : ", wrong") : ""}.`;
  }
  return { node, at, steps };
}

function player() {
  const films = new Map(); // problem -> films of it
  for (const film of data.films) films.set(film.prompt, [...(films.get(film.prompt) ?? []), film]);
  const speeds = [1, 2, 4, 8, 16, 32];
  let panes = [];
  let names = [];
  let step = 0;
  let last = 0;
  let timer = null;

  // The two that differ most in steps make the better story.
  function story(of) {
    const byNfe = [...of].sort((a, b) => a.nfe - b.nfe);
    return [byNfe[0], byNfe[byNfe.length - 1]];
  }
  function problemChosen() {
    const of = films.get(Number(id("problem").value));
    const [left, right] = story(of);
    const labels = of.map((film) => data.cells[film.cell].label); // mostly these are different here, and shorter
    names = new Set(labels).size === of.length ? labels : of.map((film) => data.cells[film.cell].name);
    const entries = names.map((name, i) => [i, name]);
    choices(id("left"), entries, of.indexOf(left));
    choices(id("right"), entries, of.indexOf(right));
    id("prompt").textContent = data.prompts[of[0].prompt][1];
    samplersChosen();
  }
  function samplersChosen() {
    pause();
    const of = films.get(Number(id("problem").value));
    const chosen = [...new Set([id("left").value, id("right").value])];
    panes = chosen.map((i) => pane(of[i], names[i]));
    id("panes").replaceChildren(...panes.map(({ node }) => node));
    last = Math.max(...panes.map(({ steps }) => steps));
    id("scrubber").max = last;
    id("speed").value = String(speeds.find((speed) => last / speed <= 14) ?? 32);
    to(last);
  }
  function to(next, quiet = false) {
    step = Math.min(Math.max(next, 0), last);
    const said = panes.map(({ at }) => at(step));
    id("scrubber").value = step;
    id("scrubber").setAttribute("aria-valuetext", `step ${step} of ${last}`);
    id("step").textContent = `step ${step} of ${last}`;
    if (!quiet) id("said").textContent = `Step ${step} of ${last}. ${said.join(" ")}`;
  }
  function pause() {
    clearInterval(timer);
    timer = null;
    id("playing").textContent = "Play";
    id("icon").setAttribute("d", "M2 1v10l9-5z");
  }
  function start() {
    if (step === last) to(0, true);
    id("playing").textContent = "Pause";
    id("icon").setAttribute("d", "M2 1h3v10H2zM7 1h3v10H7z");
    const tick = () => {
      to(step + 1, step + 1 < last);
      if (step === last) pause();
    };
    timer = setInterval(tick, 1000 / Number(id("speed").value));
  }
  const toggle = () => (timer ? pause() : start());
  const by = (move) => () => {
    pause();
    to(move());
  };

  const problems = [...films.keys()];
  const gap = (problem) =>
    story(films.get(problem))
      .map((film) => film.nfe)
      .reduce((a, b) => b - a);
  const best = problems.reduce((a, b) => (gap(b) > gap(a) ? b : a));
  const named = problems.map((i) => [i, data.prompts[i][0]]);
  const rates = speeds.map((n) => [n, `${n} / s`]);
  choices(id("problem"), named, best);
  choices(id("speed"), rates, 2);
  const gradient = [...Array(11).keys()].map((i) => `rgb(${shade(i / 10)})`).join(", ");
  id("scale").style.background = `linear-gradient(90deg, ${gradient})`;
  id("problem").addEventListener("input", problemChosen);
  id("left").addEventListener("input", samplersChosen);
  id("right").addEventListener("input", samplersChosen);
  id("play").addEventListener("click", toggle);
  const moves = { first: () => 0, back: () => step - 1, forward: () => step + 1 };
  for (const [name, move] of Object.entries(moves)) id(name).addEventListener("click", by(move));
  id("scrubber").addEventListener("input", (event) => by(() => Number(event.target.value))());
  id("speed").addEventListener("input", () => timer && (pause(), start()));
  id("player").addEventListener("keydown", (event) => {
    if (event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { ArrowLeft: moves.back, ArrowRight: moves.forward, Home: moves.first, End: () => last };
    if (keys[event.key]) by(keys[event.key])();
    else if (event.key === " " && !event.target.matches("button")) toggle();
    else return;
    event.preventDefault();
  });
  problemChosen();
}

const plots = (name, make) => () => {
  id(name)
    .querySelector(".plots")
    .append(...make());
};
const sampled = data.cells.some((cell) => cell.passes.length > 1);
const chained = data.cells.some((cell) => cell.chain);
const sections = [
  ["results", data.cells.length, table],
  ["fronts", data.cells.length, plots("fronts", fronts)],
  ["player", data.films.length, player],
  ["passes", sampled, plots("passes", passes)],
  ["chains", chained, plots("chains", chains)],
  ["runs", data.curves.length, plots("runs", training)],
  ["completions", data.completions.length, completions],
];
for (const [name, wanted, build] of sections) {
  if (!wanted) continue;
  id(name).hidden = false;
  id("nav").append(html("a", { href: `#${name}` }, id(name).dataset.name));
  build();
}
