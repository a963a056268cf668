"""The plots of a report as files, for papers and slides: PNG and SVG, drawn with matplotlib from the page's data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dllm_gym.files import written

COLOURS = "#2457d6 #c2410c #0b7a53 #b0188f #6b3fd4 #0b7c94 #8a6100 #c01f3c #4d5566 #4b7a06".split()
MARKERS = "os^Dv"
DASHES = ["-", (0, (5, 3)), ":", "-.", (0, (8, 3))]


def write_plots(data: dict, folder: Path) -> list[Path]:
    """Write every plot of a report.

    Args:
        data: what `report_data.payload` returns.
        folder: made where there is something to plot.

    Returns:
        The files, as PNG and SVG each.
    """
    plots: dict[str, Callable] = {}
    for group, title in enumerate(data["groups"]):
        cells = [cell for cell in data["cells"] if cell["group"] == group]
        plots[f"front {title}"] = lambda axes, c=cells, t=title: _front(axes, c, t, data["families"])
        sampled = [cell for cell in cells if len(cell["passes"]) > 1]
        if sampled:
            plots[f"pass-at-k {title}"] = lambda axes, c=sampled, t=title: _passes(axes, c, t)
        for key in ("acceptance", "log_likelihood"):
            chains = [cell for cell in cells if (cell["chain"] or {}).get(key)]
            if chains:
                plots[f"{key} {title}"] = lambda axes, c=chains, t=title, k=key: _chains(axes, c, t, k)
    for curve in data["curves"]:
        plots[f"training {curve['metric']}"] = lambda axes, c=curve: _curve(axes, c)
    return [file for name, draw in plots.items() for file in _write(folder, name, draw)]


def _write(folder: Path, name: str, draw: Callable) -> list[Path]:
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, whose backend and figures are the caller's

    stem = re.sub(r"[^\w.]+", "-", name.replace("_", "-")).strip("-.")[:120]
    # Names are untrusted: a "$" in one must not be read as mathematics. The salt makes equal plots equal files.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "dllm-gym", "font.size": 9}):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, ncols=1 + len(axes.get_legend_handles_labels()[0]) // 12)
        files = [folder / f"{stem}.png", folder / f"{stem}.svg"]
        for file, options in zip(files, ({"dpi": 150}, {"metadata": {"Date": None}}), strict=True):
            with written(file) as temporary:
                figure.savefig(temporary, **options)
    return files


def _front(axes, cells: list[dict], title: str, names: list[str]) -> None:
    families: dict[int, list[dict]] = {}
    for cell in cells:
        families.setdefault(cell["family"], []).append(cell)
    for family, members in families.items():
        rows = [cell["summary"] for cell in sorted(members, key=lambda cell: cell["summary"]["nfe"])]
        x, y = [row["nfe"] for row in rows], [100 * row["accuracy"] for row in rows]
        axes.errorbar(
            x,
            y,
            yerr=_error(y, [[100 * end for end in row["accuracy_interval"]] for row in rows]),
            xerr=_error(x, [row["nfe_interval"] for row in rows]),
            **_look(members[0]),
            linestyle="" if members[0]["learned"] else ":",
            linewidth=1,
            label=names[family],
        )
    best = sorted((c["summary"]["nfe"], 100 * c["summary"]["accuracy"], c["label"]) for c in cells if c["front"])
    axes.plot(*zip(*[point[:2] for point in best], strict=True), "--", color="#333333", linewidth=1, zorder=1)
    for nfe, accuracy, label in best:
        axes.annotate(label, (nfe, accuracy), (5, -10), textcoords="offset points", fontsize=7)
    nfe = [cell["summary"]["nfe"] for cell in cells]
    if max(nfe) > 5 * min(nfe):
        _log_axis(axes)
    axes.set(xlabel="NFE (denoiser forwards per completion)", ylabel="accuracy % (95 % intervals)", title=title)


def _passes(axes, cells: list[dict], title: str) -> None:
    for cell, dash in _dashed(cells):
        k, *percent = zip(*cell["passes"], strict=True)
        mean, low, high = ([100 * value for value in values] for values in percent)
        axes.plot(k, mean, linestyle=dash, label=cell["label"], **_look(cell))
        axes.fill_between(k, low, high, color=_look(cell)["color"], alpha=0.12, linewidth=0)
    _log_axis(axes, base=2)
    axes.set(xlabel="k", ylabel="Pass@k % (95 % intervals)", title=title)


def _chains(axes, cells: list[dict], title: str, key: str) -> None:
    for cell, dash in _dashed(cells):
        values = [float("nan") if value is None else value for value in cell["chain"][key]]
        # The log-likelihood has a value more: that of the state before the first step.
        last = len(cell["chain"]["acceptance"])
        axes.plot(
            range(last + 1 - len(values), last + 1),
            values,
            linestyle=dash,
            color=_look(cell)["color"],
            label=cell["label"],
        )
    axes.set(xlabel="Metropolis-Hastings step", ylabel=key.replace("_", "-") + ", mean over chains", title=title)


def _curve(axes, curve: dict) -> None:
    for run in curve["runs"]:
        colour, dash = COLOURS[run["index"] % len(COLOURS)], DASHES[run["index"] // len(COLOURS) % len(DASHES)]
        axes.plot(run["step"], run["raw"], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(run["step"], run["smooth"], color=colour, linestyle=dash, label=run["name"])
    axes.set(xlabel=curve["along"], ylabel=curve["metric"], title=f"Training: {curve['metric']} (strong: running mean)")


def _look(cell: dict) -> dict:
    """A family's colour and marker, as on the page; what was learned is a star."""
    family = cell["family"]
    marker = {"marker": "*", "markersize": 13} if cell["learned"] else {"marker": MARKERS[family % len(MARKERS)]}
    return {"color": COLOURS[family % len(COLOURS)], "markersize": 5} | marker


def _dashed(cells: list[dict]):
    """Cells with a line style; those of one family differ in it."""
    seen: dict[int, int] = {}
    for cell in cells:
        nth = seen[cell["family"]] = seen.get(cell["family"], -1) + 1
        yield cell, DASHES[nth % len(DASHES)]


def _error(values: list[float], intervals: list) -> list[list[float]]:
    """Distances below and above. A bootstrap interval may miss its mean by a rounding error."""
    low = [max(value - ends[0], 0) for value, ends in zip(values, intervals, strict=True)]
    high = [max(ends[1] - value, 0) for value, ends in zip(values, intervals, strict=True)]
    return [low, high]


def _log_axis(axes, base: int = 10) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_locator(LogLocator(base, subs=(1,) if base == 2 else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
