"""Distributions over sets of positions, against enumeration of everything that can be drawn."""

import itertools
import math

import pytest
import torch

from dllm_gym.agents.samplers.distributions import DISTRIBUTIONS, DPLS, Bernoulli

NAMES = sorted(DISTRIBUTIONS)
LENGTHS = (1, 2, 3, 4)


def uniforms(logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """What `sample` draws with."""
    return torch.rand(len(logits), logits.shape[1] + 1, generator=torch.Generator().manual_seed(seed))


def patterns(length: int) -> list[list[bool]]:
    return [list(bits) for bits in itertools.product([False, True], repeat=length)]


def draws(name: str, eligible: list[bool]) -> list[tuple[int, ...]]:
    """Every possible draw as the tuple of its positions: sets in rising order, DPLS in the order of the picks."""
    positions = [i for i, bit in enumerate(eligible) if bit]
    arrange = itertools.combinations if name == "bernoulli" else itertools.permutations
    least = 1 if name == "dpls" and positions else 0
    return [draw for n in range(least, len(positions) + 1) for draw in arrange(positions, n)]


def as_picks(name: str, all_draws: list[tuple[int, ...]], length: int) -> torch.Tensor:
    picks = torch.zeros(len(all_draws), length, dtype=torch.int64)
    for row, draw in zip(picks, all_draws, strict=True):
        for n, position in enumerate(draw, start=1):
            row[position] = n if name == "dpls" else 1
    return picks


def plain_probability(name: str, logits: list[float], eligible: list[bool], draw: tuple[int, ...]) -> float:
    """The definition, one choice after the other."""
    left = [i for i, bit in enumerate(eligible) if bit]
    if name == "bernoulli":
        rates = [1 / (1 + math.exp(-x)) for x in logits]
        return math.prod(rates[i] if i in draw else 1 - rates[i] for i in left)
    probability = 1.0
    for n, position in enumerate(draw):
        stop = 1.0 if n else 0.0
        probability *= math.exp(logits[position]) / (stop + sum(math.exp(logits[i]) for i in left))
        left.remove(position)
    return probability / (1 + sum(math.exp(logits[i]) for i in left))


def enumerated(name: str, eligible: list[bool], seed: int = 0, scale: float = 2.0):
    """All draws of a row with random float64 logits: logits, eligible and picks, one a draw; plain probabilities."""
    length = len(eligible)
    logits = scale * torch.randn(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = draws(name, eligible)
    plain = torch.tensor([plain_probability(name, logits.tolist(), eligible, draw) for draw in found])
    rows = torch.tensor(eligible).expand(len(found), -1)
    return logits.expand(len(found), -1), rows, as_picks(name, found, length), plain.double()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_log_prob_and_entropy_against_enumeration(name, length):
    distribution = DISTRIBUTIONS[name]()
    for seed, eligible in enumerate(patterns(length)):
        logits, rows, picks, plain = enumerated(name, eligible, seed)
        probability = distribution.log_prob(logits, rows, picks).exp()
        assert probability.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(probability, plain)
        entropy = distribution.entropy(logits, rows, picks)
        exact = -torch.xlogy(probability, probability).sum().item()
        # Bernoulli: exact whatever was drawn. DPLS: the sum over a path's choices, whose mean is the draw's entropy.
        assert (probability * entropy).sum().item() == pytest.approx(exact, abs=1e-12)
        if name == "bernoulli":
            torch.testing.assert_close(entropy, torch.full_like(entropy, exact))


@pytest.mark.parametrize("quantity", ["log_prob", "entropy"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name, quantity):
    function = getattr(DISTRIBUTIONS[name](), quantity)
    for seed, eligible in enumerate(patterns(4)):
        logits, rows, picks, _ = enumerated(name, eligible, seed)
        logits = logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, e=rows, p=picks: function(x, e, p), (logits,), eps=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_log_probability_is_fitted_by_gradient_ascent_on_one_draw(name):
    eligible, picks = torch.tensor([[True, True, True, False]]), torch.tensor([[0, 1, 0, 0]])
    logits = torch.zeros(1, 4, requires_grad=True)
    DISTRIBUTIONS[name]().log_prob(logits, eligible, picks).sum().backward()
    assert logits.grad[0, 1] > 0 and (logits.grad[0, [0, 2]] < 0).all() and logits.grad[0, 3] == 0


@pytest.mark.parametrize("eligible", [[True] * 3, [True, False, True, True], [False, True, False]])
@pytest.mark.parametrize("name", NAMES)
def test_frequencies_of_the_sampler(name, eligible):
    number = 40_000
    found = draws(name, eligible)
    logits = torch.tensor([0.7, -1.1, -0.4, 1.6])[: len(eligible)]
    logits = logits.expand(number, -1)
    picks = DISTRIBUTIONS[name]().sample(logits, torch.tensor(eligible).expand(number, -1), uniforms(logits, 3))
    logits = logits[0]
    counts = dict(zip(map(tuple, as_picks(name, found, len(eligible)).tolist()), [0] * len(found), strict=True))
    for row, count in zip(*(x.tolist() for x in picks.unique(dim=0, return_counts=True)), strict=True):
        counts[tuple(row)] += count  # a KeyError here is a draw that cannot happen
    plain = [plain_probability(name, logits.tolist(), eligible, draw) for draw in found]
    distance = sum(abs(count / number - p) for count, p in zip(counts.values(), plain, strict=True)) / 2
    assert distance < 0.012


@pytest.mark.parametrize("name", NAMES)
def test_a_large_batch_of_patterns(name):
    """Nothing ineligible is picked, DPLS numbers its picks 1..n and is never empty, a draw has a probability."""
    generator = torch.Generator().manual_seed(0)
    eligible = torch.rand(2000, 9, generator=generator) < torch.rand(2000, 1, generator=generator)
    logits = 3 * torch.randn(2000, 9, generator=generator)
    distribution = DISTRIBUTIONS[name]()
    picks = distribution.sample(logits, eligible, uniforms(logits))
    assert picks.shape == (2000, 9) and picks.dtype == torch.int64
    assert not (picks > 0)[~eligible].any()
    if name == "dpls":
        number = (picks > 0).sum(dim=1)
        assert torch.equal(number > 0, eligible.any(dim=1))
        ordered = picks.masked_fill(picks == 0, 99).sort(dim=1).values
        ranks = torch.arange(1, 10)
        assert torch.equal(torch.where(ranks <= number[:, None], ordered, ranks), ranks.expand(2000, -1))
    else:
        assert set(picks.unique().tolist()) == {0, 1}
    log_prob = distribution.log_prob(logits, eligible, picks)
    assert log_prob.isfinite().all() and (log_prob <= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_with_nothing_eligible(name):
    distribution = DISTRIBUTIONS[name]()
    logits = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.2, -0.3]], requires_grad=True)
    eligible = torch.tensor([[False] * 3, [True] * 3])
    picks = distribution.sample(logits.detach(), eligible, uniforms(logits))
    assert not picks[0].any()
    for quantity in (distribution.log_prob, distribution.entropy):
        value = quantity(logits, eligible, picks)
        assert value[0] == 0 and value[1] != 0
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert not gradient[0].any() and gradient[1].isfinite().all() and gradient[1].any()


@pytest.mark.parametrize("scale", [50.0, 80.0])
@pytest.mark.parametrize("name", NAMES)
def test_large_logits_stay_finite(name, scale):
    distribution = DISTRIBUTIONS[name]()
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        found = draws(name, [True] * 3)
        picks, eligible = as_picks(name, found, 3), torch.ones(len(found), 3, dtype=torch.bool)
        logits = (scale * torch.tensor(signs)).repeat(len(found), 1).requires_grad_()
        log_prob = distribution.log_prob(logits, eligible, picks)
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
        if name == "dpls":
            plain = [math.log(max(plain_probability(name, logits[0].tolist(), [True] * 3, d), 1e-300)) for d in found]
            torch.testing.assert_close(log_prob.detach(), torch.tensor(plain), atol=1e-3, rtol=1e-5)
        for value in (log_prob, distribution.entropy(logits, eligible, picks)):
            assert value.isfinite().all()
            (gradient,) = torch.autograd.grad(value.sum(), logits)
            assert gradient.isfinite().all()
        drawn = distribution.sample(logits.detach(), eligible, uniforms(logits)) > 0
        if name == "dpls" and max(signs) < 0:
            assert (drawn.sum(dim=1) == 1).all()
        else:
            assert torch.equal(drawn, logits > 0), "DPLS: all that beat STOP by far, and no others"


@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_from_the_numbers_given(name):
    logits, eligible = torch.zeros(64, 6), torch.ones(64, 6, dtype=torch.bool)
    distribution = DISTRIBUTIONS[name]()

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 2**31)
        return distribution.sample(logits, eligible, uniforms(logits, seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("quantity", ["log_prob", "entropy"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_outside_eligible_do_not_matter(name, quantity):
    for seed, pattern in enumerate(patterns(4)):
        logits, eligible, picks, _ = enumerated(name, pattern, seed)
        value = getattr(DISTRIBUTIONS[name](), quantity)
        other = torch.where(eligible, logits, torch.tensor([40.0, -40.0, 7.0, -3.0], dtype=torch.float64))
        torch.testing.assert_close(value(logits, eligible, picks), value(other, eligible, picks))


def test_a_set_may_be_empty_and_an_ordered_draw_not():
    logits, eligible = torch.full((1, 2), -9.0), torch.ones(1, 2, dtype=torch.bool)
    assert not Bernoulli().sample(logits, eligible, uniforms(logits)).any()
    assert DPLS().sample(logits, eligible, uniforms(logits)).sum() == 1
