"""Figures of an evaluation, against values by hand and by enumeration."""

from itertools import combinations
from math import exp

import numpy as np
import pytest

from dllm_gym.agents.evaluation import bootstrap_interval, seeded_interval
from dllm_gym.eval.metrics import aup, distinct, interquartile_mean, pass_at_k, probability_of_improvement, summary
from dllm_gym.eval.results import Cell

CORRECT = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k):
    exact = [np.mean([row[list(chosen)].any() for chosen in combinations(range(4), k)]) for row in CORRECT]
    assert pass_at_k(CORRECT, k) == pytest.approx(exact)


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_samples(k):
    with pytest.raises(ValueError, match=f"k={k}: must be 1 to 4"):
        pass_at_k(CORRECT, k)


def test_distinct_texts():
    assert distinct([["a b", "a  b", "c"], ["a", "b", "c"]]) == pytest.approx([2 / 3, 1])


def test_accuracy_under_parallelism_by_hand():
    assert aup([2.0], [0.8]) == pytest.approx(160)
    full, less = 80.0, 78 * exp(-3 * (1 - 78 / 80))
    assert aup([4.0, 1.0], [0.78, 0.80]) == pytest.approx(80 + 3 * (full + less) / 2)
    # A point more than five points below the slowest one counts for nothing.
    assert aup([1.0, 4.0, 8.0], [0.80, 0.78, 0.74]) == aup([1.0, 4.0], [0.80, 0.78])
    # Against a better opponent the same front is worth less, but for its first point, which is not weighed.
    assert 80 < aup([1.0, 4.0], [0.80, 0.78], best=0.9) < aup([1.0, 4.0], [0.80, 0.78])
    assert aup([1.0, 2.0], [0.0, 0.0]) == 0
    with pytest.raises(ValueError, match="2 and 1 values"):
        aup([1.0, 2.0], [0.5])


def test_the_summary_of_a_cell():
    def problem(index: int, correct: list[bool], texts: list[str]) -> dict:
        lists = {"correct": correct, "score": [float(c) for c in correct], "nfe": [4, 8], "reward": [0.5, 0.0]}
        more = {"length": [12, 6], "log_likelihood": [-1.0, -3.0], "completion": texts}
        return {"index": index, "problem_id": str(index), "prompt": ""} | lists | more

    cell = Cell("k", {"samples": 2})
    cell.add("problem", problem(0, [True, False], ["a", "b"]))
    cell.add("problem", problem(1, [True, True], ["a", "a"]))
    figures = summary(cell)
    assert figures["tokens_per_second"] is None
    assert figures["accuracy"] == 0.75 and figures["accuracy_interval"] == [0.5, 1.0]
    assert figures["pass_at_k"] == {"1": 0.75, "2": 1.0}
    assert (figures["nfe"], figures["tokens_per_forward"], figures["reward"]) == (6, 1.5, 0.25)
    assert (figures["entropy"], figures["distinct"]) == (2.0, 0.75)
    cell.add("end", {"seconds": 4.0, "tokens": 36, "forwards": 24})
    assert summary(cell)["tokens_per_second"] == 9


def test_interquartile_mean_and_probability_of_improvement():
    assert interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, -50.0])) == 2
    assert interquartile_mean(np.array([4.0, 1.0])) == 2.5
    first, second = np.array([1.0, 3.0]), np.array([2.0, 1.0, 0.0])
    assert probability_of_improvement(first, second) == pytest.approx((0.5 + 1 + 3) / 6)


def test_an_interval_over_seeds_is_wider_where_seeds_differ():
    """And that of single seeds is the paired one over problems."""
    rng = np.random.default_rng(0)
    first, second = rng.random((1, 300)), rng.random((1, 300))
    paired = bootstrap_interval((first - second)[0])
    assert seeded_interval(first, second) == pytest.approx(paired, abs=0.01)
    runs = first + np.array([-0.3, -0.1, 0.0, 0.1, 0.3])[:, None]
    low, high = seeded_interval(runs, second)
    assert high - low > 1.5 * (paired[1] - paired[0])
    assert low < float(first.mean() - second.mean()) < high
