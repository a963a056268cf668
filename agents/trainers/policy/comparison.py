"""The end of a sampler's training: learned policies beside every heuristic, as a table and as a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.evaluation import Evaluation, bootstrap_interval, describe_tasks, describe_undecided, evaluate
from dllm_gym.agents.samplers.base import Sampler
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.samplers.policy import UnmaskingPolicy
from dllm_gym.agents.terminal import console
from dllm_gym.files import written


@dataclass
class ReportConfig:
    """The comparison at the end of training."""

    problems: int = 512
    """Number of held-out problems, taken from the start of the test split."""
    validation_problems: int = 256
    """Number of problems on which the best threshold is chosen, taken from the end of the training split."""
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    """Thresholds to choose from."""
    heuristics: bool = True
    """Also evaluate other heuristics; without them, all of the thresholds are shown."""
    enabled: bool = True
    """Compare the trained policy with the heuristics at the end."""


SHOWN_THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
"""Thresholds in the table, beside the chosen one."""
HEURISTIC_SETTINGS: list[tuple[str, dict]] = [
    ("entropy-bounded", {"gamma": 2.0}),
    ("entropy-bounded", {"gamma": 0.5}),
    ("factor", {"factor": 1.0}),
    ("confidence", {"k": 4}),
    ("random", {"k": 4}),
    ("left-to-right", {"k": 4}),
    ("confidence", {"k": 2}),
    ("confidence", {"k": 1}),
]
"""Those that need few forward passes first. The last writes one token per step, as all others do with k=1."""


def report(folder: Path, config: ReportConfig, env_config: EnvConfig, learned: dict[str, UnmaskingPolicy]) -> dict:
    """Evaluate, print the table, write ``front.png``, and return the summary.

    Every sampler's figures are printed as soon as they are known. The summary has a row per sampler (means with 95 %
    bootstrap intervals), the chosen threshold, and for the last of ``learned`` the paired difference of its reward to
    that threshold's.
    """
    if not config.enabled:
        return {}
    from tqdm import tqdm

    validation = make_envs(env_config, "train")
    size = len(validation[0].episodes.task)
    indices = range(max(0, size - config.validation_problems), size)
    chosen, _ = choose_threshold(validation, config, indices)
    envs = make_envs(env_config, "test", denoiser=validation[0].episodes.denoiser)
    problems = range(min(config.problems, len(envs[0].episodes.task)))
    shown = {chosen, *SHOWN_THRESHOLDS} if config.heuristics else config.thresholds
    samplers: dict[str, Sampler] = dict(learned)
    for threshold in sorted(shown):
        samplers[f"threshold {threshold:g}"] = make_policy("threshold", threshold=threshold)
    for name, settings in HEURISTIC_SETTINGS if config.heuristics else ():
        samplers[f"{name} {next(iter(settings.values())):g}"] = make_policy(name, **settings)
    results: dict[str, Evaluation] = {}
    with tqdm(samplers, desc="evaluating", dynamic_ncols=True, leave=False, disable=None) as bar:
        for label in bar:
            results[label] = evaluate(envs, samplers[label], problems)
            accuracy, nfe, reward = (getattr(results[label], name).mean() for name in ("correct", "nfe", "reward"))
            bar.write(f"{label:<22}accuracy {100 * accuracy:5.1f} %   NFE {nfe:5.1f}   reward {reward:.3f}")

    rows = {label: result.summary() for label, result in results.items()}
    last, best = list(learned)[-1], f"threshold {chosen:g}"
    difference = results[last].reward - results[best].reward
    summary: dict[str, Any] = {
        "env": asdict(env_config),
        "problems": len(problems),
        "chosen_threshold": chosen,
        "reward_over_threshold": float(difference.mean()),
        "reward_over_threshold_interval": list(bootstrap_interval(difference)),
        "rows": rows,
    }
    print_table(summary, list(learned))
    draw_front(folder / "front.png", summary, list(learned))
    low, high = summary["reward_over_threshold_interval"]
    print(f"{last} over {best} (chosen on other problems): reward {difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    print(f"plot: {folder / 'front.png'}")
    return summary


def choose_threshold(envs, config: ReportConfig, problems) -> tuple[float, dict[float, float]]:
    """The threshold with the best mean reward on some problems, and the mean reward of each."""
    rewards = {
        threshold: float(evaluate(envs, make_policy("threshold", threshold=threshold), problems).reward.mean())
        for threshold in config.thresholds
    }
    return max(rewards, key=lambda threshold: rewards[threshold]), rewards


def print_table(summary: dict, learned: list[str]) -> None:
    """Samplers by falling reward, learned ones and the chosen threshold marked."""
    from rich.table import Table

    env = summary["env"]
    table = Table(
        title=f"{env['id']}, {summary['problems']} held-out problems, alpha {env['alpha']:g} (95 % intervals)"
    )
    table.add_column("sampler")
    for name in ("accuracy %", "NFE", "reward"):
        table.add_column(name, justify="right")
    best = f"threshold {summary['chosen_threshold']:g}"
    for label, row in sorted(summary["rows"].items(), key=lambda item: -item[1]["reward"]):
        low, high = (100 * x for x in row["accuracy_interval"])
        below, above = row["reward_interval"]
        style = "bold" if label in learned else "cyan" if label == best else None
        table.add_row(
            label + (" (chosen)" if label == best else ""),
            f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
            f"{row['nfe']:.1f}",
            f"{row['reward']:.3f} [{below:.3f}, {above:.3f}]",
            style=style,
        )
    console().print(table)
    for label, row in summary["rows"].items():
        if "by_task" in row and label in (*learned, best):
            print(f"{label}: {describe_tasks(row['by_task'])}")
        if row["undecided"]:
            print(f"{label}: {describe_undecided(row['undecided'])}")


def draw_front(path: Path, summary: dict, learned: list[str]) -> None:
    """Accuracy over NFE: the thresholds as a line, other heuristics as points, learned policies as stars."""
    from matplotlib.figure import Figure  # not pyplot, whose backend and figures are the caller's

    rows = summary["rows"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[str]] = {}
    for label in rows:
        if label not in learned:
            families.setdefault(label.rsplit(" ", 1)[0], []).append(label)
    for family, labels in families.items():
        labels = sorted(labels, key=lambda label: rows[label]["nfe"])
        x, y = [rows[label]["nfe"] for label in labels], [100 * rows[label]["accuracy"] for label in labels]
        if family == "threshold":
            error = np.abs(np.array([rows[label]["accuracy_interval"] for label in labels]).T * 100 - y)
            axes.errorbar(x, y, error, marker="o", color="black", capsize=2, label=family, zorder=3)
        else:
            axes.plot(x, y, marker=".", linestyle=":", alpha=0.7, label=family)
    for label, colour in zip(learned, ("tab:gray", "tab:red", "tab:orange", "tab:purple"), strict=False):
        row = rows[label]
        error = np.abs(np.array(row["accuracy_interval"])[:, None] * 100 - 100 * row["accuracy"])
        axes.errorbar(
            row["nfe"],
            100 * row["accuracy"],
            error,
            marker="*",
            markersize=15,
            color=colour,
            capsize=2,
            linestyle="",
            label=label,
            zorder=4,
        )
    axes.set(xlabel="denoiser forwards per completion (NFE)", ylabel="accuracy %", title=summary["env"]["id"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    with written(path) as temporary:
        figure.savefig(temporary, dpi=150)
