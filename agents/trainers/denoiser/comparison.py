"""The end of a denoiser's training: before and after on held-out problems, as a table, and the curve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.evaluation import Evaluation, bootstrap_interval, describe_tasks, describe_undecided, evaluate
from dllm_gym.agents.samplers.base import Sampler
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.terminal import console
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.files import written


@dataclass
class DenoiserReportConfig:
    """The comparison at the end of training."""

    problems: int = 512
    """Number of held-out problems, taken from the start of the test split."""
    samplers: tuple[str, ...] = ("confidence:k=1", "threshold:threshold=0.9")
    """Samplers to decode with, at temperature 0."""
    enabled: bool = True
    """Compare the trained denoiser with the original one at the end."""


def report(folder: Path, config: DenoiserReportConfig, env: EnvConfig, trained: Denoiser, algorithm: str) -> dict:
    """Evaluate the denoiser that training began with and the trained one, print the table, draw ``curve.png``.

    The summary has a row for each sampler and denoiser (means with 95 % bootstrap intervals), and for each sampler the
    paired difference in accuracy.
    """
    draw_curve(folder, algorithm)
    return compare(folder, config, env, trained, algorithm) if config.enabled else {}


def compare(
    folder: Path,
    config: DenoiserReportConfig,
    env: EnvConfig,
    trained: Denoiser,
    algorithm: str,
    learned: Mapping[str, Sampler] | None = None,
) -> dict:
    """The table, on the config's samplers and on ``learned`` ones."""
    before = load_denoiser(env.denoiser_name, **env.loading | {"device": trained.device})
    samplers = {text: make_stepwise(text, device=trained.device) for text in config.samplers} | dict(learned or {})
    results = {
        name: evaluate_denoiser(denoiser, samplers, config.problems, env)
        for name, denoiser in (("before", before), (algorithm, trained))
    }
    rows, gains = {}, {}
    for text in samplers:
        rows[text] = {name: by_sampler[text].summary() for name, by_sampler in results.items()}
        difference = results[algorithm][text].correct.astype(float) - results["before"][text].correct
        gains[text] = {"gain": float(difference.mean()), "interval": list(bootstrap_interval(difference))}
    count = len(next(iter(results["before"].values())).correct)
    summary = {"env": asdict(env), "problems": count, "rows": rows, "gains": gains}
    print_table(summary, algorithm)
    return summary


def evaluate_denoiser(
    denoiser: Denoiser, samplers: Mapping[str, Sampler], problems: int, env: EnvConfig
) -> dict[str, Evaluation]:
    """Each sampler on the first problems of the test split, tokens the argmax."""
    confidence_k = max(env.confidence_k, *(sampler.confidence_k for sampler in samplers.values()))
    made = make_envs(env, "test", denoiser=denoiser, temperature=0.0, confidence_k=confidence_k)
    indices = range(min(problems, len(made[0].episodes.task)))
    return {text: evaluate(made, sampler, indices) for text, sampler in samplers.items()}


def print_table(summary: dict, algorithm: str) -> None:
    """A row for each sampler and denoiser."""
    from rich.table import Table

    table = Table(title=f"{summary['env']['id']}, {summary['problems']} held-out problems (95 % intervals)")
    table.add_column("sampler")
    table.add_column("denoiser")
    for name in ("accuracy %", "NFE", "gain in points"):
        table.add_column(name, justify="right")
    for sampler, rows in summary["rows"].items():
        for name, row in rows.items():
            low, high = (100 * x for x in row["accuracy_interval"])
            gain = summary["gains"][sampler]
            below, above = (100 * x for x in gain["interval"])
            table.add_row(
                sampler,
                name,
                f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
                f"{row['nfe']:.1f}",
                f"{100 * gain['gain']:+.1f} [{below:+.1f}, {above:+.1f}]" if name == algorithm else "",
                style="bold" if name == algorithm else None,
            )
    console().print(table)
    for sampler, rows in summary["rows"].items():
        for name, row in rows.items():
            if "by_task" in row:
                print(f"{sampler}, {name}: {describe_tasks(row['by_task'])}")
            if row["undecided"]:
                print(f"{sampler}, {name}: {describe_undecided(row['undecided'])}")


def draw_curve(folder: Path, algorithm: str) -> None:
    """Training reward and accuracy over iterations."""
    from matplotlib.figure import Figure  # not pyplot, whose backend and figures are the caller's

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour in (("reward", "tab:red"), ("accuracy", "tab:blue")):
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], color=colour, label=name)
    axes.set(xlabel="iteration", ylabel="of the sampled completions", title=algorithm, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    with written(folder / "curve.png") as temporary:
        figure.savefig(temporary, dpi=150)
