// Plots: SVG drawn at the width there is, in the page's own colours.

const SHAPES = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0 ${-1.25 * r}L${1.2 * r} ${r}H${-1.2 * r}z`,
  (r) => `M0 ${-1.35 * r}L${1.35 * r} 0L0 ${1.35 * r}L${-1.35 * r} 0z`,
  (r) => `M0 ${1.25 * r}L${1.2 * r} ${-r}H${-1.2 * r}z`,
];
const star = (r) =>
  "M" +
  [...Array(10).keys()]
    .map((i) => {
      const [size, angle] = [i % 2 ? 0.9 * r : 2.1 * r, (i * Math.PI) / 5];
      return `${(size * Math.sin(angle)).toFixed(2)} ${(-size * Math.cos(angle)).toFixed(2)}`;
    })
    .join("L") +
  "z";
const shape = (series, r) => (series.learned ? star : SHAPES[series.family % SHAPES.length])(r);
const DASHES = [null, "7 4", "2 4", "9 3 2 3", "12 5"];
const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

function ticks(low, high, axis, room) {
  if (axis.log) {
    const tens = [0, 1, 2, 3, 4, 5].flatMap((e) => (high / low > 64 ? [1] : [1, 2, 5]).map((m) => m * 10 ** e));
    const all = axis.powers ? [...Array(20).keys()].map((e) => 2 ** e) : tens;
    return all.filter((t) => t >= low && t <= high);
  }
  const raw = (high - low) / room;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(unit * [1, 2, 5, 10].find((m) => m * unit >= raw), axis.whole ? 1 : 0);
  const all = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) all.push(Number((i * step).toPrecision(8)));
  return all;
}

// From values to pixels, with a margin at both ends; an axis with bounds is not drawn far beyond them.
function scale(values, axis, from, to) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (axis.log) {
    const edge = Math.max((high / low) ** 0.05, 1.05);
    [low, high] = [low / edge, high * edge];
  } else {
    const edge = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    [low, high] = [low - edge, high + edge];
    if (axis.bounds) [low, high] = [Math.max(low, axis.bounds[0]), Math.min(high, axis.bounds[1] + 0.3 * edge)];
  }
  const f = axis.log ? Math.log : (x) => x;
  return Object.assign((x) => from + ((f(x) - f(low)) / (f(high) - f(low))) * (to - from), { low, high });
}

function axes(spec, x, y, [left, right, top, bottom]) {
  const text = (words, attributes) => svg("text", { "text-anchor": "middle", ...attributes }, String(words));
  return [
    ...ticks(y.low, y.high, spec.y, 7).flatMap((t) => [
      svg("path", { class: "grid", d: `M${left} ${y(t)}H${right}` }),
      text(t, { x: left - 7, y: y(t) + 4, "text-anchor": "end" }),
    ]),
    ...ticks(x.low, x.high, spec.x, right - left < 360 ? 4 : 7).flatMap((t) => [
      svg("path", { class: "grid", d: `M${x(t)} ${top}V${bottom}` }),
      text(t, { x: x(t), y: bottom + 17 }),
    ]),
    svg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}` }),
    text(spec.x.label, { x: (left + right) / 2, y: bottom + 35 }),
    text(spec.y.label, { transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)` }),
  ];
}

function curve(series, x, y) {
  const group = svg("g", { class: "series", "--c": series.colour });
  const draw = (name, d, more = {}) => group.append(svg("path", { class: name, d, ...more }));
  const through = (points, of = (p) => p.y) => path(points.map((p) => [x(p.x), y(of(p))]));
  if (series.band) {
    const back = through([...series.points].reverse(), (p) => p.ys[0]).replace("M", "L");
    draw("band", `${through(series.points, (p) => p.ys[1])}${back}z`);
  }
  if (series.raw) draw("line faint", through(series.raw));
  if (series.line) draw(`line ${series.line}`, through(series.points), { "stroke-dasharray": series.dash });
  for (const p of series.marks ? series.points : []) {
    if (p.ys && !series.band) draw("error", `M${x(p.x)} ${y(p.ys[0])}V${y(p.ys[1])}`);
    if (p.xs) draw("error", `M${x(p.xs[0])} ${y(p.y)}H${x(p.xs[1])}`);
    draw("mark", shape(series, 4.6), { transform: `translate(${x(p.x).toFixed(1)} ${y(p.y).toFixed(1)})` });
  }
  return group;
}

// Names beside points, each at the first of four places where it covers neither a point nor another name.
function labels(points, boxes, [left, right, top, bottom], x, y) {
  const taken = [...boxes];
  const free = ([a, b, c, d]) =>
    a > left && c < right && b > top && d < bottom && !taken.some((t) => a < t[2] && c > t[0] && b < t[3] && d > t[1]);
  return points.flatMap((p) => {
    const wide = p.name.length * 6.2;
    const sides = [x(p.x) + 9, x(p.x) - 9 - wide];
    const places = [13, -7].flatMap((down) => sides.map((side) => [side, y(p.y) + down]));
    const place = places.find(([a, b]) => free([a, b - 10, a + wide, b + 2]));
    if (!place) return [];
    taken.push([place[0], place[1] - 10, place[0] + wide, place[1] + 2]);
    return [svg("text", { class: "label", x: place[0], y: place[1] }, p.name)];
  });
}

// A figure from a specification: axes {label, digits, log, powers, whole, bounds}, and series of points
// {x, y, xs, ys, name}, where xs and ys are intervals. `line` joins the points, "strong" or "thin"; `raw`: points of a
// faint line; `band`: ys as an area; `marks`: a mark a point; `front`: points of the Pareto line, with names.
function plot(spec) {
  const hidden = new Set();
  const names = html("div", { class: "names", role: "group", "aria-label": "Shown in the plot" });
  const holder = html("div");
  let width = 0;
  let places = [];
  let ring = null;

  for (const series of spec.series) {
    const sample = svg("svg", { class: "series", "--c": series.colour, viewBox: "0 0 22 12", "aria-hidden": "true" });
    if (series.line) sample.append(svg("path", { class: "line", d: "M0 6H22", "stroke-dasharray": series.dash }));
    if (series.marks)
      sample.append(svg("path", { class: "mark", d: shape(series, 3.6), transform: "translate(11 6)" }));
    const toggle = (event) => {
      if (!hidden.delete(series)) hidden.add(series);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(series)));
      draw();
    };
    const about = { "aria-pressed": "true", title: series.name, onclick: toggle };
    names.append(html("button", about, sample, series.name));
  }

  function draw() {
    const height = Math.round(Math.min(Math.max(width * 0.6, 250), 430));
    const frame = [52, width - 10, 10, height - 40];
    const all = spec.series.flatMap((series) => [...series.points, ...(series.raw ?? [])]);
    const x = scale(
      all.flatMap((p) => p.xs ?? p.x),
      spec.x,
      frame[0],
      frame[1],
    );
    const y = scale(
      all.flatMap((p) => p.ys ?? p.y),
      spec.y,
      frame[3],
      frame[2],
    );
    const shown = spec.series.filter((series) => !hidden.has(series));
    const points = shown.flatMap((series) => series.points);
    places = shown.flatMap((series) => series.points.map((p) => ({ p, series, x: x(p.x), y: y(p.y) })));
    ring = svg("path", { class: "ring", d: SHAPES[0](8), visibility: "hidden" });
    const about = { role: "img", "aria-label": spec.describe, viewBox: `0 0 ${width} ${height}`, height };
    const picture = svg("svg", { ...about, onpointermove: point, onpointerdown: point, onpointerleave: leave });
    picture.append(...axes(spec, x, y, frame));
    if (spec.front) picture.append(svg("path", { class: "front", d: path(spec.front.map((p) => [x(p.x), y(p.y)])) }));
    picture.append(...shown.map((series) => curve(series, x, y)), ring);
    if (spec.front) {
      const named = points.filter((p) => spec.front.some((q) => q.name === p.name));
      const marks = points.map((p) => [x(p.x) - 5, y(p.y) - 5, x(p.x) + 5, y(p.y) + 5]);
      const errors = points.map((p) => [x(p.x) - 2, y(p.ys[1]), x(p.x) + 2, y(p.ys[0])]);
      picture.append(...labels(named, [...marks, ...errors], frame, x, y));
    }
    holder.replaceChildren(picture);
  }
  // What the nearest point says, where the pointer is near one.
  function point(event) {
    const box = holder.getBoundingClientRect();
    const away = (place) => Math.hypot(place.x - (event.clientX - box.left), place.y - (event.clientY - box.top));
    const nearest = places.reduce((a, b) => (a && away(a) <= away(b) ? a : b), null);
    if (!nearest || away(nearest) > 36) return leave();
    ring.setAttribute("transform", `translate(${nearest.x} ${nearest.y})`);
    ring.setAttribute("visibility", "visible");
    const { p, series } = nearest;
    const line = (axis, value, ends) => {
      const text = (number) => fixed(number, axis.whole ? 0 : axis.digits);
      return `${axis.label}: ${text(value)}${ends ? ` [${ends.map(text).join(", ")}]` : ""}`;
    };
    const tip = id("tip");
    tip.textContent = [p.name ?? series.name, line(spec.y, p.y, p.ys), line(spec.x, p.x, p.xs)].join("\n");
    tip.hidden = false;
    const rightmost = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(box.left + nearest.x + 14, rightmost))}px`;
    tip.style.top = `${box.top + scrollY + nearest.y + 14}px`;
  }
  function leave() {
    ring.setAttribute("visibility", "hidden");
    id("tip").hidden = true;
  }
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (!now || now === width) return;
    width = now;
    draw();
  }).observe(holder);
  return html("figure", {}, html("h3", {}, spec.title), holder, names);
}
