"""The tables of an experiment: every try, every cell, every comparison."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dllm_gym.agents.evaluation import describe_undecided, seeded_interval
from dllm_gym.eval.experiments.file import Comparison, Experiment
from dllm_gym.eval.metrics import interquartile_mean, probability_of_improvement, summary
from dllm_gym.eval.results import Cell
from dllm_gym.eval.tables import ids, unit, values, with_interval


def tries_table(whole: Experiment, accuracies: dict[str, list[float | None]]) -> str:
    """Every try, with the accuracy by which the best was chosen."""
    if not accuracies:
        return ""
    lines = ["| training | try | accuracy on training problems % |", "| --- | --- | --- |"]
    for name, values_of in accuracies.items():
        for variant, accuracy in zip(whole.train[name].variants(), values_of, strict=True):
            text = ", ".join(f"{key} {variant.settings[key]}" for key in whole.train[name].tries)
            shown = "failed" if accuracy is None else f"{100 * accuracy:.1f}"
            lines.append(f"| {name} | {text} | {shown} |")
    return "\n".join(lines)


def _variant(name: str, variants: list, i: int) -> str:
    """The name of a cell and what is particular about one of its variants."""
    if len(variants) == 1:
        return name
    (sampler, env), points = variants[i], [env for _, env in variants]
    axes = [f"{key} {env[key]}" for key in env if any(point[key] != env[key] for point in points)]
    named = [sampler] if len({text for text, _ in variants}) > 1 else []
    return f"{name}: {', '.join(named + axes)}"


def cell_table(found: dict[tuple[str, int], list[Cell]], variants: dict[str, list]) -> str:
    """Means over seeds, and accuracy and reward of each."""
    lines = ["| cell | accuracy % | by seed | NFE | reward | pass@k % |", "| --- | --- | --- | --- | --- | --- |"]
    notes = []
    for (name, i), cells in found.items():
        rows = [summary(cell) for cell in cells]
        undecided = sum((Counter(row["undecided"]) for row in rows), Counter())
        if undecided:
            notes.append(f"\n{_variant(name, variants[name], i)}: {describe_undecided(undecided)}")
        accuracy = [100 * row["accuracy"] for row in rows]
        passes = [f"{k}: {100 * np.mean([row['pass_at_k'][k] for row in rows]):.1f}" for k in rows[0]["pass_at_k"]]
        figures = [
            f"{np.mean(accuracy):.1f}",
            ", ".join(f"{a:.1f}" for a in accuracy),
            f"{np.mean([row['nfe'] for row in rows]):.2f}",
            f"{np.mean([row['reward'] for row in rows]):.3f}",
            ", ".join(passes) if len(passes) > 1 else "",
        ]
        lines.append(f"| {' | '.join([_variant(name, variants[name], i), *figures])} |")
    return "\n".join(lines + notes)


def comparison_table(comparisons: list[Comparison], found: dict, choosing: dict, variants: dict[str, list]) -> str:
    """Paired by problem. 95 % intervals, interquartile means and probabilities as arXiv 2108.13264 recommends them."""
    columns = (
        "first",
        "second",
        "metric",
        "first minus second [95 %]",
        "interquartile mean",
        "P(first above second)",
        "by seed",
    )
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for entry in comparisons:
        for (first, a, mine), (second, b, theirs) in _pairs(entry, found, choosing, variants):
            if mine != theirs:
                raise ValueError(f"compare {first} and {second}: different problems, nothing can be paired.")
            scale, digits = unit(entry.metric)
            text = with_interval(a.mean() - b.mean(), seeded_interval(a, b), digits, scale, "+")
            by_seed = a.mean(axis=1) - b.mean(axis=1)
            middle = f"{scale * interquartile_mean(by_seed):+.{digits}f}"
            above = f"{probability_of_improvement(a.mean(axis=1), b.mean(axis=1)):.2f}"
            shown = ", ".join(f"{scale * d:+.{digits}f}" for d in by_seed)
            lines.append(f"| {first} | {second} | {entry.metric} | {text} | {middle} | {above} | {shown} |")
    return "\n".join(lines) if comparisons else ""


def _pairs(entry: Comparison, found: dict, choosing: dict, variants: dict[str, list]) -> list[tuple]:
    """What is compared: label, ``[seeds, N]`` figures and problem ids of a first and a second, once or more."""

    def figures(cells: list[Cell]) -> np.ndarray:
        return np.stack([values(cell, entry.metric) for cell in cells])

    def option(name: str, i: int) -> tuple[str, np.ndarray, list[str]]:
        return _variant(name, variants[name], i), figures(found[name, i]), ids(found[name, i][0])

    counts = [len(variants[name]) for name in (entry.first, entry.second)]
    if counts[0] == counts[1]:
        return [(option(entry.first, i), option(entry.second, i)) for i in range(counts[0])]
    best = min if entry.metric == "nfe" else max
    chosen = []
    for name, count in zip((entry.first, entry.second), counts, strict=True):
        judged = [figures(choosing.get((name, i), found[name, i])).mean() for i in range(count)]
        chosen.append(option(name, judged.index(best(judged))))
    return [tuple(chosen)]
