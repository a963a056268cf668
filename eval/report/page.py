"""``dllm-eval report RESULTS... --output report.html``: results as one page that needs nothing but a browser.

The page holds its data, style and script; a folder beside it holds the plots as PNG and SVG files.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import tyro

from dllm_gym.eval.command import run
from dllm_gym.eval.report.data import payload
from dllm_gym.eval.report.plots import write_plots
from dllm_gym.files import write_text

SCRIPTS = ("page.js", "plots.js", "figures.js", "player.js")


@dataclass
class ReportConfig:
    """Write results as a page: tables, plots, a player of decodings, every completion."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files that dllm-eval wrote, and folders of training runs."""
    output: Path = Path("report.html")
    """The page to write. The plots go to a folder beside it, for example report-plots for report.html."""
    completions: int = 20_000
    """Maximum number of completions shown, from the first problems of every cell. All of them count in the tables."""
    overwrite: bool = False
    """Replace the page if it exists."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a mistake in what was given."""
    return run("dllm_gym.eval.report", ReportConfig, report, argv)


def report(config: ReportConfig) -> None:
    """Write the page and its plots, and say where they are."""
    if config.output.exists() and (config.output.is_dir() or not config.overwrite):
        raise FileExistsError(f"output={str(config.output)!r} exists: name another file, or give --overwrite.")
    plots = write_report(list(config.results), config.output, config.completions)
    print(f"report: {config.output}")
    if plots:
        print(f"plots:  {plots[0].parent} ({len(plots)} files)")


def write_report(paths: list[Path], output: Path, completions: int = 20_000) -> list[Path]:
    """Write the page to ``output`` and each plot as PNG and SVG into ``<output stem>-plots`` beside it.

    Args:
        paths: files of results and folders of runs.
        output: the page, a .html file; it is replaced.
        completions: how many completions it lists at most.

    Returns:
        The files of the plots.

    Raises:
        ValueError: no path, one that does not exist or is neither results nor a run, or an output that is no .html.
    """
    if output.suffix != ".html":
        raise ValueError(f"output={str(output)!r}: must be a .html file.")
    if completions < 0:
        raise ValueError(f"completions={completions}: must be 0 or more.")
    if not paths:
        raise ValueError("no results: give a file that dllm-eval wrote, or the folder of a training run.")
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"results={str(path)!r}: does not exist; give a file that dllm-eval wrote, or a run's folder."
            )
    data = payload(paths, completions)
    write_text(output, _page(data))
    return write_plots(data, output.with_name(f"{output.stem}-plots"))


def _page(data: dict) -> str:
    style = _asset("page.css")
    script = "".join(_asset(name) for name in SCRIPTS)
    # Nothing but our own script and style may run, and nothing may be loaded, whatever stands in a completion.
    allowed = f"default-src 'none'; img-src data:; script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    # Inside a script element only "<" can end it or begin a comment; JSON strings may hold it escaped.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Template(_asset("page.html")).substitute(
        title=html.escape(data["title"]), policy=allowed, style=style, script=script, data=embedded
    )


def _asset(name: str) -> str:
    return (files("dllm_gym.eval.report") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
