// Which plots there are, and what is in them.

const plotIf = (cells, spec) => (cells.length ? plot(spec) : "");
const percent = (interval) => interval?.map((x) => 100 * x);
const inGroup = (group, test) => data.cells.filter((cell) => cell.group === group && test(cell));

// Cells of one family share a colour; their lines differ by dashes.
function cellSeries(cells, more) {
  const seen = new Map();
  return cells.map((cell) => {
    const nth = seen.get(cell.family) ?? 0;
    seen.set(cell.family, nth + 1);
    return {
      name: cell.label,
      colour: colour(cell),
      family: cell.family,
      learned: cell.learned,
      dash: DASHES[nth % DASHES.length],
      line: "strong",
      ...more(cell),
    };
  });
}

function fronts() {
  return data.groups.map((title, group) => {
    const cells = inGroup(group, () => true);
    const nfe = cells.map((cell) => cell.summary.nfe);
    const points = (some) =>
      some
        .map(({ label, summary }) => ({
          name: label,
          x: summary.nfe,
          y: 100 * summary.accuracy,
          xs: summary.nfe_interval,
          ys: percent(summary.accuracy_interval),
        }))
        .sort((a, b) => a.x - b.x);
    const series = [...new Set(cells.map((cell) => cell.family))].map((family) => {
      const members = cells.filter((cell) => cell.family === family);
      const { learned } = members[0];
      const line = members.length > 1 && !learned ? "thin" : null;
      const about = { name: data.families[family], family, learned, colour: colour(members[0]) };
      return { ...about, marks: true, line, points: points(members) };
    });
    return plot({
      title,
      describe: `Accuracy over NFE, ${title}; the numbers stand in the table of results.`,
      x: { label: "NFE", digits: 2, log: Math.max(...nfe) > 5 * Math.min(...nfe) },
      y: { label: "accuracy %", digits: 1, bounds: [0, 100] },
      series,
      front: points(cells.filter((cell) => cell.front)),
    });
  });
}

function passes() {
  return data.groups.map((title, group) => {
    const cells = inGroup(group, (cell) => cell.passes.length > 1);
    const points = (cell) => cell.passes.map(([k, y, ...ends]) => ({ x: k, y: 100 * y, ys: percent(ends) }));
    return plotIf(cells, {
      title,
      describe: `Pass@k over k, ${title}.`,
      x: { label: "k", log: true, powers: true, whole: true },
      y: { label: "Pass@k %", digits: 1, bounds: [0, 100] },
      series: cellSeries(cells, (cell) => ({ band: true, marks: true, points: points(cell) })),
    });
  });
}

function chains() {
  return data.groups.flatMap((title, group) =>
    ["acceptance", "log_likelihood"].map((key) => {
      const cells = inGroup(group, (cell) => cell.chain?.[key]?.length);
      // The log-likelihood has a value more: that of the state before the first step.
      const first = (cell) => cell.chain.acceptance.length + 1 - cell.chain[key].length;
      const points = (cell) => cell.chain[key].map((y, i) => ({ x: first(cell) + i, y })).filter((p) => known(p.y));
      const label = key === "acceptance" ? "acceptance" : "log-likelihood";
      return plotIf(cells, {
        title: `${label} · ${title}`,
        describe: `${label} by step, ${title}.`,
        x: { label: "step", whole: true },
        y: { label, digits: 3 },
        series: cellSeries(cells, (cell) => ({ points: points(cell) })),
      });
    }),
  );
}

function training() {
  return data.curves.map(({ metric, along, runs }) =>
    plot({
      title: metric,
      describe: `${metric} over training, by ${along}.`,
      x: { label: along, whole: true },
      y: { label: metric, digits: 3 },
      series: runs.map((run) => {
        const zip = (ys) => ys.map((y, i) => ({ x: run.step[i], y }));
        return {
          name: run.name,
          family: run.index,
          colour: `var(--s${run.index % 10})`,
          dash: DASHES[Math.floor(run.index / 10) % DASHES.length],
          line: "strong",
          raw: zip(run.raw),
          points: zip(run.smooth),
        };
      }),
    }),
  );
}
