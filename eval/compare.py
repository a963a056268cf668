"""``dllm-eval compare A B``: two results on the same problems, with a paired test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from dllm_gym.agents.evaluation import bootstrap_interval
from dllm_gym.eval.results import Cell, read_results
from dllm_gym.eval.tables import ids, settings_that_differ, unit, values, with_interval


@dataclass
class CompareConfig:
    """Compare a cell of one results file with a cell of another, or of the same, problem by problem."""

    first: Annotated[Path, tyro.conf.Positional]
    """A results file."""
    second: Annotated[Path, tyro.conf.Positional]
    """A results file whose cell the first one's is compared with."""
    first_cell: str | None = None
    """Which cell of the first file, if it has several: the beginning of its key, or its sampler."""
    second_cell: str | None = None
    """Which cell of the second file, if it has several."""
    metrics: tuple[str, ...] = ("accuracy", "reward", "nfe")
    """Metrics to compare: "accuracy", "reward", "score", "nfe", "pass@k"."""
    common: bool = False
    """If the problems differ, compare on those that both have."""


def compare(config: CompareConfig) -> None:
    """Print the settings that differ, then the differences."""
    first = pick(read_results(config.first), config.first, config.first_cell)
    second = pick(read_results(config.second), config.second, config.second_cell)
    mine, theirs = ids(first), ids(second)
    if not mine or not theirs:
        raise ValueError("one of the results has no finished problems: there is nothing to compare.")
    if set(mine) != set(theirs):
        shared = len(set(mine) & set(theirs))
        if not config.common or not shared:
            raise ValueError(
                f"different problems: {len(mine)} and {len(theirs)}, of which {shared} are the same; "
                + ("give --common to compare on those." if shared else "nothing can be paired.")
            )
        print(f"on the {shared} problems that both have, of {len(mine)} and {len(theirs)}")
    print(f"first:  {first.key} {first.settings['sampler']}\nsecond: {second.key} {second.settings['sampler']}")
    for name, (a, b) in settings_that_differ([first, second]).items():
        print(f"  {name}: {a!r} and {b!r}")
    for metric in config.metrics:
        a, b = (dict(zip(ids(cell), values(cell, metric), strict=True)) for cell in (first, second))
        difference = np.array([a[problem] - b[problem] for problem in mine if problem in b])
        scale, digits = unit(metric)
        text = with_interval(difference.mean(), bootstrap_interval(difference), digits, scale, "+")
        print(f"{metric}: first minus second {text}, p = {paired_test(difference):.2g}")


def pick(cells: list[Cell], path: Path, wanted: str | None) -> Cell:
    """The only cell of a file, or the one asked for. Raises ValueError, with what there is, for none or several."""
    found = [c for c in cells if wanted is None or c.key.startswith(wanted) or c.settings["sampler"] == wanted]
    if len(found) != 1:
        there = "; ".join(f"{cell.key} {cell.settings['sampler']}" for cell in cells)
        asked = f"for {wanted!r}" if wanted else "(choose by --first-cell, --second-cell)"
        raise ValueError(f"{path}: {len(found)} cells {asked}, must be one. It has: {there}.")
    return found[0]


def paired_test(difference: np.ndarray, draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip permutation test that the mean of paired differences is 0.

    Args:
        difference: ``[N]``, one a problem.
        draws: random flips, of which the observed signs are one more: no p-value is below 1 / (draws + 1).
    """
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    rng, observed, extreme = np.random.default_rng(seed), abs(difference.sum()), 1
    for size in np.diff(np.r_[0:draws:1000, draws]):
        flips = rng.choice([-1.0, 1.0], size=(size, len(difference)))
        extreme += int((np.abs(flips @ difference) >= observed - 1e-9).sum())
    return extreme / (draws + 1)
