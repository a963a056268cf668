"""Every heuristic sampler on observations made by hand."""

import math

import pytest
import torch

from dllm_gym.agents import make_policy
from dllm_gym.agents.samplers.base import Sampler, as_sampler
from dllm_gym.agents.samplers.heuristics import HEURISTICS
from dllm_gym.types import Observation

K_SAMPLERS = ("random", "confidence", "margin", "entropy", "left-to-right", "tempered-confidence")
RANDOM = ("random", "tempered-confidence")


def see(confidence, eligible=None, entropy=None) -> Observation:
    """Rows of confidences (a number, or the top k of a position); eligible everywhere unless told."""
    confidence = torch.tensor(confidence)
    confidence = confidence if confidence.ndim == 3 else confidence[..., None]
    shape = confidence.shape[:2]
    eligible = torch.ones(shape, dtype=torch.bool) if eligible is None else torch.tensor(eligible).bool()
    entropy = torch.zeros(shape) if entropy is None else torch.tensor(entropy)
    zeros = torch.zeros(shape, dtype=torch.int64)
    return Observation(confidence, entropy, zeros, eligible.clone(), eligible, torch.zeros(shape[0]), entropy)


def chosen(unmask: torch.Tensor) -> list[list[int]]:
    assert unmask.dtype == torch.bool
    return [row.nonzero()[:, 0].tolist() for row in unmask]


def random_observation(rows: int = 200, length: int = 6, seed: int = 0) -> Observation:
    """Two confidences a position in steps of 0.1, so that there are ties; rows with few or none eligible."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 11, (rows, length), generator=generator) / 10
    top = torch.stack([first, first * torch.rand(rows, length, generator=generator)], dim=-1)
    entropy = torch.randint(0, 8, (rows, length), generator=generator) / 8
    eligible = torch.rand(rows, length, generator=generator) < torch.rand(rows, 1, generator=generator)
    return see(top.tolist(), eligible.tolist(), entropy.tolist())


ONE = [[0.3, 0.9, 0.5, 0.8]]
CASES = [
    ("confidence", {"k": 2}, see(ONE), [[1, 3]]),
    ("confidence", {"k": 2}, see(ONE, [[1, 0, 1, 1]]), [[2, 3]]),
    ("confidence", {}, see([[0.5, 0.7, 0.7, 0.7]]), [[1]]),  # ties: the leftmost
    ("confidence", {"k": 2}, see([[0.7, 0.5, 0.7, 0.7]]), [[0, 2]]),
    ("confidence", {"k": 9}, see(ONE, [[1, 0, 0, 1]]), [[0, 3]]),  # more than there are
    ("margin", {}, see([[[0.6, 0.4], [0.5, 0.1], [0.9, 0.8]]]), [[1]]),
    ("margin", {"k": 2}, see([[[0.6, 0.4, 0.0], [0.5, 0.1, 0.1], [0.9, 0.8, 0.0]]]), [[0, 1]]),
    ("entropy", {}, see(ONE, entropy=[[0.4, 0.2, 0.1, 0.3]]), [[2]]),
    ("entropy", {"k": 2}, see(ONE, [[1, 1, 0, 1]], [[0.4, 0.2, 0.1, 0.3]]), [[1, 3]]),
    ("left-to-right", {}, see(ONE), [[0]]),
    ("left-to-right", {"k": 2}, see(ONE, [[0, 1, 0, 1]]), [[1, 3]]),
    # Decided per row: the second row has nothing above the threshold and takes its best; the third is through.
    (
        "threshold", {"threshold": 0.6}, see([[0.9, 0.7], [0.2, 0.4], [0, 0]], [[1, 1], [1, 1], [0, 0]]),
        [[0, 1], [1], []],
    ),
    ("threshold", {"threshold": 0.5}, see([[0.5, 0.5, 0.25], [0.5, 0.75, 0.5]]), [[0], [1]]),  # above, not at
    ("threshold", {"threshold": 0.2}, see([[0.9, 0.3, 0.1]], [[0, 0, 1]]), [[2]]),
    ("threshold", {"threshold": 2.0}, see(ONE), [[1]]),
    # (n + 1) * (1 - c_(n)) for 0.9, 0.8, 0.5, 0.3: 0.2, 0.6, 2.0, 3.5
    ("factor", {"factor": 0.1}, see(ONE), [[1]]),
    ("factor", {"factor": 0.5}, see(ONE), [[1]]),
    ("factor", {"factor": 1.0}, see([[0.3, 0.9, 0.5, 0.8], [0.1, 0.2, 0.3, 0.25]]), [[1, 3], [2]]),
    ("factor", {"factor": 2.1}, see(ONE), [[1, 2, 3]]),
    ("factor", {"factor": 9.0}, see(ONE, [[1, 0, 1, 0]]), [[0, 2]]),
    ("factor", {"factor": 1.5}, see([[0.5, 0.5, 0.5]]), [[0]]),
    # Rising entropies 0.125, 0.25, 0.5, 1: sum - max is 0, 0.125, 0.375, 0.875
    ("entropy-bounded", {"gamma": 0.0}, see(ONE, entropy=[[0.5, 0.125, 1.0, 0.25]]), [[1]]),
    ("entropy-bounded", {"gamma": 0.125}, see(ONE, entropy=[[0.5, 0.125, 1.0, 0.25]]), [[1, 3]]),  # <=, not <
    ("entropy-bounded", {"gamma": 0.5}, see(ONE * 2, entropy=[[0.5, 0.125, 1, 0.25], [3, 2, 4, 5]]), [[0, 1, 3], [1]]),
    ("entropy-bounded", {"gamma": 9.0}, see(ONE, [[1, 0, 1, 0]], [[0.5, 0.0, 1.0, 0.0]]), [[0, 2]]),
    ("entropy-bounded", {"gamma": 0.0}, see(ONE, entropy=[[0.0, 0.5, 0.0, 0.5]]), [[0, 1, 2]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "observation", "expected"), CASES)
def test_sets_by_hand(name, arguments, observation, expected):
    assert chosen(make_policy(name, **arguments)(observation)) == expected


def slow_factor(confidence: list[float], factor: float) -> int:
    """The largest n with ``(n + 1) * (1 - c_(n)) < factor``, at least 1."""
    ordered = sorted(confidence, reverse=True)
    return max([1, *(n for n in range(1, len(ordered) + 1) if (n + 1) * (1 - ordered[n - 1]) < factor)])


def slow_entropy_bound(entropy: list[float], gamma: float) -> int:
    """The largest n whose n lowest entropies have ``sum - max <= gamma``."""
    ordered = sorted(entropy)
    return max(n for n in range(1, len(ordered) + 1) if sum(ordered[:n]) - max(ordered[:n]) <= gamma)


@pytest.mark.parametrize("value", [0.0625, 0.25, 0.75, 1.25, 2.5])
@pytest.mark.parametrize("name", ["factor", "entropy-bounded"])
def test_against_a_slow_loop(name, value):
    observation = random_observation()
    policy = make_policy(name, **{"factor" if name == "factor" else "gamma": value})
    sizes = set()
    for row, unmask in enumerate(chosen(policy(observation))):
        positions = observation.eligible[row].nonzero()[:, 0].tolist()
        signal = -observation.confidence[row, :, 0] if name == "factor" else observation.entropy[row]
        values = [signal[i].item() for i in positions]
        slow = slow_factor([-v for v in values], value) if name == "factor" else None
        number = 0 if not values else slow or slow_entropy_bound(values, value)
        assert unmask == sorted(sorted(positions, key=lambda i, s=signal: (s[i].item(), i))[:number])
        sizes.add(number)
    assert len(sizes) > 2


@pytest.mark.parametrize("name", HEURISTICS)
def test_at_least_one_a_row_and_only_eligible_ones(name):
    observation = random_observation()
    unmask = make_policy(name)(observation)
    assert unmask.dtype == torch.bool and unmask.shape == observation.masked.shape
    assert not (unmask & ~observation.eligible).any()
    assert torch.equal(unmask.any(dim=1), observation.eligible.any(dim=1))


@pytest.mark.parametrize("k", [1, 2, 5, 50])
@pytest.mark.parametrize("name", K_SAMPLERS)
def test_k_of_the_eligible_or_all_of_them(name, k):
    observation = random_observation()
    unmask = make_policy(name, k=k)(observation)
    assert torch.equal(unmask.sum(dim=1), observation.eligible.sum(dim=1).clamp(max=k))


@pytest.mark.parametrize("name", sorted(HEURISTICS.keys() - set(RANDOM)))
def test_a_row_does_not_depend_on_the_rows_beside_it(name):
    observation = random_observation()
    whole = make_policy(name)(observation)
    assert torch.equal(whole, torch.cat([make_policy(name)(observation[i : i + 1]) for i in range(len(observation))]))


@pytest.mark.parametrize("name", HEURISTICS)
def test_signals_say_all_that_is_read(name):
    observation = random_observation()
    hidden = see(torch.rand(200, 6, 2).tolist(), observation.eligible.tolist(), torch.rand(200, 6).tolist())
    for signal in HEURISTICS[name].signals:
        setattr(hidden, signal, getattr(observation, signal))
    assert torch.equal(make_policy(name)(observation), make_policy(name)(hidden))


@pytest.mark.parametrize("name", RANDOM)
def test_random_ones_repeat_by_seed(name):
    observation = see(torch.full((64, 8), 0.5).tolist())

    def draw(seed: int) -> list[torch.Tensor]:
        policy = make_policy(name, seed=seed)
        return [policy(observation), policy(observation)]

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("name", "arguments", "weights"),
    [
        ("random", {}, [1, 1, 1, 0]),
        ("tempered-confidence", {}, [0.1, 0.6, 0.3, 0]),
        ("tempered-confidence", {"temperature": 0.5}, [0.1**2, 0.6**2, 0.3**2, 0]),
        ("tempered-confidence", {"temperature": 0.01}, [0, 1, 0, 0]),
    ],
)
def test_frequencies(name, arguments, weights):
    number = 20_000
    observation = see([[0.1, 0.6, 0.3, 0.9]] * number, [[1, 1, 1, 0]] * number)
    frequency = make_policy(name, **arguments)(observation).float().mean(dim=0)
    distance = (frequency - torch.tensor(weights) / math.fsum(weights)).abs().sum() / 2
    assert distance < 0.015


def test_margin_needs_two_confidences():
    with pytest.raises(ValueError, match="confidence_k=2"):
        make_policy("margin")(see(ONE))


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("greedy", {}, ["'greedy'", *HEURISTICS]),
        ("threshold", {"k": 2}, ["'threshold'", "k", "threshold"]),
        ("random", {"generator": None}, ["generator", "k, seed"]),
        *((name, {"k": k}, [f"k={k}"]) for name in K_SAMPLERS for k in (0, -1)),
        ("factor", {"factor": 0.0}, ["factor=0.0"]),
        ("entropy-bounded", {"gamma": -0.5}, ["gamma=-0.5"]),
        ("tempered-confidence", {"temperature": 0.0}, ["temperature=0.0"]),
    ],
)
def test_bad_argument_is_named(name, arguments, parts):
    with pytest.raises(ValueError) as caught:
        make_policy(name, **arguments)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HEURISTICS)
def test_heuristics_are_samplers(name):
    sampler = make_policy(name)
    assert isinstance(sampler, Sampler) and sampler.stepwise and sampler.ignores_tokens
    assert sampler.draws == ("seed" in sampler.settings())
    assert make_policy(name, **sampler.settings()).settings() == sampler.settings()


@pytest.mark.parametrize("name", ["random", "tempered-confidence"])
def test_what_a_heuristic_draws_follows_from_the_rows_own_numbers(name):
    seen, uniforms = random_observation(6), torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    picks, _ = make_policy(name, k=2).choose(seen, uniforms=uniforms)
    some = torch.tensor([4, 1])
    again, _ = make_policy(name, k=2, seed=5).choose(seen[some], uniforms=uniforms[some])
    assert torch.equal(again, picks[some]) and (picks.sum(dim=1) == seen.eligible.sum(dim=1).clamp(max=2)).all()
    other, _ = make_policy(name, k=2).choose(seen, uniforms=uniforms.flip(0))
    assert not torch.equal(other, picks)


def test_a_plain_function_is_a_sampler():
    everything = as_sampler(lambda observation: observation.eligible)
    assert isinstance(everything, Sampler) and not everything.ignores_tokens
    assert as_sampler(everything) is everything
