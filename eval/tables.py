"""Cells side by side: what differs between their settings, their figures, and paired comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from dllm_gym.agents.evaluation import bootstrap_interval, by_task, describe_tasks, describe_undecided
from dllm_gym.agents.terminal import console
from dllm_gym.envs.settings import EnvSettings
from dllm_gym.eval.metrics import aup, pass_at_k, summary
from dllm_gym.eval.results import Cell

DEFAULTS = {
    f"env.{f.name}": f.default for f in fields(EnvSettings) if f.name not in ("denoiser", "dataset", "device", "dtype")
}
"""What a table does not mention."""
NOT_SETTINGS = ("policy", "policy_settings", "films")
"""Of a cell's settings, what follows from the sampler's name or changes no figure."""


def flat_settings(cell: Cell) -> dict[str, object]:
    """Settings by dotted name (``env.block_length``), but for `NOT_SETTINGS`."""
    rest = {name: value for name, value in cell.settings.items() if name not in ("env", *NOT_SETTINGS)}
    return {f"env.{name}": value for name, value in cell.settings["env"].items()} | rest


def settings_that_differ(cells: Sequence[Cell]) -> dict[str, list]:
    """Dotted name -> the value in each cell, for settings that are not the same in all."""
    flats = [flat_settings(cell) for cell in cells]
    values = {name: [flat.get(name) for flat in flats] for flat in flats for name in flat}
    return {name: v for name, v in values.items() if any(x != v[0] for x in v)}


def print_cells(cells: Sequence[Cell]) -> None:
    """A table with a row for each cell, and the paired differences to the first where the problems are the same."""
    from rich.markup import escape
    from rich.table import Table

    differing = settings_that_differ(cells)
    columns = {name: values for name, values in differing.items() if name != "sampler"}
    shown = {
        name.removeprefix("env."): value
        for name, value in flat_settings(cells[0]).items()
        if value is not None and name != "sampler" and name not in differing and value != DEFAULTS.get(name)
    }
    title = ", ".join(str(shown.pop(name)) for name in ("id", "denoiser") if name in shown)
    title += ", {} {} problems".format(*(shown.pop(name, "") for name in ("problems", "split")))
    caption = ", ".join(f"{name} {value}" for name, value in shown.items())
    table = Table(title=f"{' '.join(title.split())} (95 % intervals)", caption=caption)
    table.add_column("sampler", no_wrap=True)
    for name in columns:
        table.add_column(name.removeprefix("env."))
    summaries, approximate = [summary(cell) for cell in cells], " (approximate)"
    ks = sorted({k for row in summaries for k in row["pass_at_k"]} - {"1"}, key=int)
    for name in (
        "accuracy %",
        "NFE",
        "positions",
        "tokens / forward",
        "reward",
        *(f"pass@{k}" for k in ks),
        "tokens / s",
    ):
        table.add_column(name, justify="right")
    for i, (cell, row) in enumerate(zip(cells, summaries, strict=True)):
        table.add_row(
            escape(cell.settings["sampler"]) + approximate * cell.settings["policy_settings"].get("approximate", False),
            *(escape(str(values[i])) for values in columns.values()),
            with_interval(row["accuracy"], row["accuracy_interval"], 1, scale=100),
            with_interval(row["nfe"], row["nfe_interval"], 2),
            "" if row["positions"] is None else f"{row['positions']:.0f}",
            f"{row['tokens_per_forward']:.2f}",
            with_interval(row["reward"], row["reward_interval"], 3),
            *(f"{100 * row['pass_at_k'][k]:.1f}" if k in row["pass_at_k"] else "" for k in ks),
            f"{row['tokens_per_second']:.0f}" if row["tokens_per_second"] else "",
        )
    console().print(table)
    for cell, row in zip(cells, summaries, strict=True):
        figures = {name: values(cell, name) for name in ("accuracy", "nfe", "reward")}
        if len(parts := by_task(ids(cell), figures)) > 1:
            print(f"{cell.settings['sampler']}: {describe_tasks(parts)}")
        if row["undecided"]:
            print(f"{cell.settings['sampler']}: {describe_undecided(row['undecided'])}")
    for front, figure in fronts(cells).items():
        print(f"accuracy under parallelism, {front}: {figure:.1f}")
    first, *others = cells
    for cell in others:
        if ids(cell) == ids(first):
            print(f"{cell.settings['sampler']} minus {first.settings['sampler']}: {differences(cell, first)}")


def fronts(cells: Sequence[Cell]) -> dict[str, float]:
    """Accuracy under parallelism (`metrics.aup`) of samplers that are there with several settings, by their name.

    Fronts on different environments are told apart by what differs. What counts in full is the highest accuracy of all
    cells on the same environment; with several seeds it is the mean over them.
    """
    groups: dict[tuple[str, str], dict[int, list[Cell]]] = {}
    for cell in cells:
        seed_free = str(cell.settings["env"]["denoiser"]).replace(f"-seed{cell.settings['seed']}/", "/")
        where = cell.settings["env"] | {"confidence_k": None, "denoiser": seed_free}
        where |= {name: cell.settings[name] for name in ("split", "problems", "samples")}
        env = json.dumps(where, sort_keys=True)
        by_seed = groups.setdefault((env, cell.settings["sampler"].partition(":")[0]), {})
        by_seed.setdefault(cell.settings["seed"], []).append(cell)
    differing = [name for name in settings_that_differ(cells) if name.startswith("env.") and name != "env.confidence_k"]
    figures = {}
    for (env, name), by_seed in groups.items():
        if all(len(front) < 2 for front in by_seed.values()):
            continue
        rivals = [
            cell for (other, _), seeds in groups.items() if other == env for row in seeds.values() for cell in row
        ]
        best = max(cell.correct.mean() for cell in rivals)
        flat = flat_settings(next(iter(by_seed.values()))[0])
        label = ", ".join([name, *(f"{key.removeprefix('env.')} {flat[key]}" for key in differing)])
        points = [[(c.length.sum() / c.nfe.sum(), c.correct.mean()) for c in front] for front in by_seed.values()]
        figures[label] = float(np.mean([aup([x for x, _ in front], [y for _, y in front], best) for front in points]))
    return figures


def ids(cell: Cell) -> list[str]:
    """The problems of a cell."""
    return [record["problem_id"] for record in cell.problems]


def values(cell: Cell, metric: str) -> np.ndarray:
    """``[N]`` one figure a problem: "accuracy", "reward", "score", "nfe", or "pass@k". Raises ValueError for others."""
    k = check_metric(metric, cell.correct.shape[1])
    return pass_at_k(cell.correct, k) if k else getattr(cell, METRICS[metric]).mean(axis=1)


METRICS = {"accuracy": "correct", "reward": "reward", "score": "score", "nfe": "nfe"}
"""Metric -> what it is the mean of."""


def unit(metric: str) -> tuple[int, int]:
    """Scale and digits of a metric: shares in percent."""
    return (100, 1) if metric == "accuracy" or metric.startswith("pass@") else (1, 3)


def check_metric(metric: str, samples: int) -> int | None:
    """The k of "pass@k", None for the other metrics. Raises ValueError for what is none, or a k above the samples."""
    if metric.startswith("pass@") and metric[5:].isdigit():
        k = int(metric[5:])
        if not 1 <= k <= samples:
            raise ValueError(f"metric={metric!r}: k={k}: must be 1 to {samples}, the samples of a problem.")
        return k
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r}: must be one of {sorted(METRICS)}, or pass@k with a number k.")
    return None


def differences(cell: Cell, other: Cell) -> str:
    """Accuracy and reward of a cell minus those of another on the same problems, with 95 % intervals."""
    accuracy, reward = (values(cell, name) - values(other, name) for name in ("accuracy", "reward"))
    return (
        f"accuracy {with_interval(accuracy.mean(), bootstrap_interval(accuracy), 1, scale=100, sign='+')}, "
        f"reward {with_interval(reward.mean(), bootstrap_interval(reward), 3, sign='+')}"
    )


def with_interval(mean: float, interval: Sequence[float], digits: int, scale: float = 1, sign: str = "") -> str:
    """``12.3 [11.0, 13.5]``."""
    low, high = interval
    return f"{scale * mean:{sign}.{digits}f} [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"
