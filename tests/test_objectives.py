"""Objectives of the denoiser: maskings, likelihood surrogates, scores, losses, against enumeration and slow loops."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dllm_gym import decoding, load_denoiser, make_task
from dllm_gym.agents.advantages import group_advantages
from dllm_gym.agents.denoiser_rl import likelihood, load_objective, ratio
from dllm_gym.agents.denoiser_rl.corruption import Corruption, completion_mask, corrupt, corrupted_canvas
from dllm_gym.agents.denoiser_rl.coupled_grpo import CoupledGRPOConfig, coupled_grpo_loss
from dllm_gym.agents.denoiser_rl.diffu_grpo import DiffuGRPOConfig, diffu_grpo_loss
from dllm_gym.agents.denoiser_rl.elbo_pg import ELBOPGConfig, elbo_pg_loss
from dllm_gym.agents.denoiser_rl.espo import ESPOConfig, espo_loss
from dllm_gym.agents.denoiser_rl.gdsd import SCORES, GDSDConfig, GDSDTLCConfig, gdsd_loss
from dllm_gym.agents.denoiser_rl.objective import Batch
from dllm_gym.agents.denoiser_rl.spg import NEGATIVES, SPGConfig, spg_loss
from dllm_gym.agents.denoiser_rl.unigrpo import UniGRPOConfig, unigrpo_loss
from dllm_gym.agents.denoiser_rl.wd1 import WD1Config, wd1_loss
from dllm_gym.denoisers import base
from dllm_gym.denoisers.oracle import (
    TabularDenoiser,
    exact_block_elbo,
    exact_elbo,
    exact_eubo,
    random_order_log_likelihood,
)
from dllm_gym.types import Canvas, Score

LENGTH = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ending(*lengths: int, length: int) -> Tensor:
    """Completions of so many tokens."""
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def draw(kind: str, completion: Tensor, maskings: int = 4, seed: int = 0, **settings) -> Corruption:
    """After prompts of five tokens, the first two of them padding."""
    prompt_mask = (torch.arange(5) >= 2).expand(len(completion), -1)
    return corrupt(kind, completion, prompt_mask, maskings, seeded(seed), **settings)


# What stands up to the end


def test_completion_mask():
    tokens = torch.tensor([[1, 2, 3, 4], [1, 9, 2, 9], [8, 8, 8, 8], [1, 2, 3, 8], [1, 8, 9, 2]])
    wanted = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert completion_mask(tokens, torch.tensor([8, 9])).int().tolist() == wanted


# Corruption: what each kind estimates


def log_prob_on(denoiser: TabularDenoiser, x: list[int], masked: set[int], position: int) -> float:
    canvas = torch.tensor([[denoiser.mask_token_id if i in masked else token for i, token in enumerate(x)]])
    return denoiser.logits(canvas)[0, position].log_softmax(dim=-1)[x[position]].item()


def slow_elbo(denoiser: TabularDenoiser, x: list[int], size: int, block_length: int) -> float:
    """Mean log-probability of the first ``size`` tokens over all orders through the blocks; the rest stays masked."""
    after = set(range(size, len(x)))
    blocks = [range(start, min(start + block_length, size)) for start in range(0, size, block_length)]
    total, count = 0.0, 0
    for parts in itertools.product(*map(itertools.permutations, blocks)):
        order = [i for part in parts for i in part]
        total += sum(log_prob_on(denoiser, x, {*order[n:], *after}, i) for n, i in enumerate(order))
        count += 1
    return total / count


def sampled_scores(denoiser: TabularDenoiser, x: list[int], corruption: Corruption) -> Tensor:
    """Log-probabilities ``[n, B, L]`` of B copies of x."""
    rows = corruption.masked.shape[1]
    tokens = torch.tensor(x).expand(rows, -1)
    prompt = torch.zeros(rows, corruption.prompt_masked.shape[2], dtype=torch.int64)
    canvas = corrupted_canvas(prompt, torch.ones_like(prompt).bool(), tokens, corruption, denoiser.mask_token_id)
    with torch.no_grad():
        score = denoiser.score(canvas, tokens.repeat(len(corruption.masked), 1), corruption.scored.flatten(0, 1))
    return score.log_prob.unflatten(0, corruption.masked.shape[:2]).double()


WRONG = {
    "uniform": lambda weight, scored, size: weight * LENGTH / size if size < LENGTH else scored.float(),
    "bernoulli": lambda weight, scored, size: scored * size / scored.sum(dim=-1, keepdim=True).clamp(min=1),
    "coupled": lambda weight, scored, size: weight * size / (size + 1),  # the published n / s
    "block": lambda weight, scored, size: weight / 2,  # without the number of blocks
}
"""Plausible weights that are not the right ones."""


@pytest.mark.parametrize("size", [LENGTH, 3])
@pytest.mark.parametrize(("kind", "block_length"), [("uniform", 4), ("bernoulli", 4), ("coupled", 4), ("block", 2)])
def test_the_weighted_sum_is_unbiased(kind, block_length, size):
    """For the any-order or block-order ELBO, also where the completion ends early; with another weight it is not."""
    denoiser, x, rows = TabularDenoiser.random(3, LENGTH, seed=1, scale=1.5), [2, 0, 1, 1], 40_000
    target = slow_elbo(denoiser, x, size, block_length)
    if size == LENGTH:
        assert target == pytest.approx(exact_block_elbo(denoiser, torch.tensor(x), block_length).item(), abs=1e-6)
    completion = ending(size, length=LENGTH).expand(rows, -1)
    corruption = draw(kind, completion, 2, block_length=block_length)
    log_prob = sampled_scores(denoiser, x, corruption)

    def error(weight: Tensor) -> float:  # in standard errors
        estimates = likelihood.elbo(log_prob, weight).sum(dim=1)
        standard_error = estimates.std() / rows**0.5
        assert standard_error < 0.015 * abs(target)
        return (abs(estimates.mean() - target) / standard_error).item()

    assert error(corruption.weight) < 4
    assert error(WRONG[kind](corruption.weight, corruption.scored, size)) > 10


def test_block_and_any_order_bounds_differ():
    """Else the test above could not tell one target from the other."""
    denoiser = TabularDenoiser.random(3, LENGTH, seed=1, scale=1.5)
    assert abs(slow_elbo(denoiser, [2, 0, 1, 1], 4, 4) - slow_elbo(denoiser, [2, 0, 1, 1], 4, 2)) > 0.1


def test_full_is_the_mean_field_surrogate():
    denoiser, x = TabularDenoiser.random(3, LENGTH, seed=1), [2, 0, 1, 1]
    corruption = draw("full", ending(3, length=LENGTH), 1)
    value = likelihood.elbo(sampled_scores(denoiser, x, corruption), corruption.weight).sum().item()
    assert value == pytest.approx(sum(log_prob_on(denoiser, x, {0, 1, 2, 3}, i) for i in range(3)), abs=1e-5)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize(("kind", "block_length"), [("uniform", None), ("coupled", None), ("block", 2)])
def test_the_eubo_of_many_maskings_is_the_exact_one(kind, block_length, beta):
    """One completion, many maskings: the mean inside the logarithm becomes the expectation, without a constant."""
    denoiser, x = TabularDenoiser.random(3, LENGTH, seed=2, scale=1.5), [2, 0, 1, 1]
    corruption = draw(kind, ending(LENGTH, length=LENGTH), 40_000, block_length=block_length)
    value = likelihood.eubo(sampled_scores(denoiser, x, corruption), corruption.weight, corruption.scored, beta).sum()
    exact = exact_eubo(denoiser, torch.tensor(x), beta, block_length).item()
    assert value.item() == pytest.approx(exact, abs=0.03)
    assert exact > exact_block_elbo(denoiser, torch.tensor(x), block_length or LENGTH).item() + 0.2


# Corruption: which tokens

LENGTHS = (12, 7, 1, 4)
KINDS = {
    "uniform": {},
    "bernoulli": {},
    "coupled": {},
    "block": {"block_length": 4},
    "full": {},
}


@pytest.fixture
def completion() -> Tensor:
    return ending(*LENGTHS, length=12)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_what_is_masked(kind, completion):
    corruption = draw(kind, completion, 6, **KINDS[kind])
    for values in (corruption.masked, corruption.scored, corruption.weight):
        assert values.shape == (6, 4, 12)
    assert corruption.prompt_masked.shape == (6, 4, 5) and not corruption.prompt_masked.any()
    assert (corruption.masked.dtype, corruption.weight.dtype) == (torch.bool, torch.float32)
    assert corruption.masked[:, ~completion].all(), "what follows the end says nothing about the length"
    assert not corruption.scored[:, ~completion].any()
    assert (corruption.masked | ~corruption.scored).all()
    assert torch.equal(corruption.weight > 0, corruption.scored)
    if kind != "block":
        assert torch.equal(corruption.masked & completion, corruption.scored)
    part = corruption[torch.tensor([2, 0])]
    assert torch.equal(part.weight, corruption.weight[:, [2, 0]]) and part.prompt_masked.shape == (6, 2, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_maskings_follow_from_the_generator_alone(kind, completion):
    before = torch.get_rng_state()
    settings = KINDS[kind] | {"p_mask_prompt": 0.5}
    one, same, other = (draw(kind, completion, seed=seed, **settings) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for name in ("masked", "scored", "weight", "prompt_masked"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.prompt_masked, other.prompt_masked)
    assert kind == "full" or not torch.equal(one.scored, other.scored)


def test_uniform_counts_are_stratified_and_even():
    """Four maskings of eight tokens: one masks 1 or 2, one 3 or 4, one 5 or 6, one 7 or 8, in any order."""
    corruption = draw("uniform", ending(8, length=8).expand(4000, -1))
    count = corruption.scored.sum(dim=-1)
    assert torch.equal((count.sort(dim=0).values - 1) // 2, torch.arange(4)[:, None].expand(-1, 4000))
    assert torch.equal(corruption.weight, corruption.scored * (8 / count)[..., None])
    for masking in count:  # each masking by itself is uniform on 1 to 8
        assert masking.bincount(minlength=9)[1:].tolist() == pytest.approx([500] * 8, abs=4 * 500**0.5)
    for total in corruption.scored.sum(dim=(0, 1)).tolist():
        assert total == pytest.approx(4 * 4000 * 4.5 / 8, rel=0.03)


def test_a_coupled_pair_scores_every_token_exactly_once(completion):
    corruption = draw("coupled", completion, 6)
    times = corruption.scored[:3].int() + corruption.scored[3:].int()
    assert torch.equal(times, completion.int().expand(3, -1, -1))
    count, size = corruption.scored.sum(dim=-1, keepdim=True), completion.sum(dim=1)[None, :, None]
    assert torch.equal(corruption.weight, corruption.scored * ((size + 1) / count.clamp(min=1)))
    many = draw("coupled", ending(3, length=3).expand(4000, -1), 2).scored[0].sum(dim=-1)
    assert many.bincount(minlength=4).tolist() == pytest.approx([1000] * 4, abs=4 * 1000**0.5)


def test_block_keeps_earlier_blocks_and_masks_later_ones(completion):
    corruption = draw("block", completion, 400, block_length=4)
    block = torch.arange(12) // 4
    for row, length in enumerate(LENGTHS):
        last = (length - 1) // 4
        seen = set()
        for masked, scored, weight in zip(
            corruption.masked[:, row], corruption.scored[:, row], corruption.weight[:, row], strict=True
        ):
            (picked,) = block[scored].unique().tolist()
            seen.add(picked)
            inside = (block == picked) & completion[row]
            assert not masked[block < picked].any() and masked[block > picked].all()
            assert torch.equal(masked & inside, scored)
            share = int(inside.sum()) / int(scored.sum())
            assert weight[scored].tolist() == pytest.approx([(last + 1) * share] * int(scored.sum()))
        assert seen == set(range(last + 1)), "never a block after the end"


def test_full_scores_everything_with_weight_one(completion):
    corruption = draw("full", completion, 2)
    assert corruption.masked.all() and torch.equal(corruption.scored, completion.expand(2, -1, -1))
    assert torch.equal(corruption.weight, corruption.scored.float())


@pytest.mark.parametrize("kind", KINDS)
def test_masking_the_prompt_never_touches_padding_and_is_never_scored(kind, completion):
    maskings = 400
    plain = draw(kind, completion, maskings, **KINDS[kind])
    some = draw(kind, completion, maskings, p_mask_prompt=0.3, **KINDS[kind])
    assert torch.equal(some.scored, plain.scored) and torch.equal(some.weight, plain.weight)
    assert not some.prompt_masked[..., :2].any()
    assert some.prompt_masked[..., 2:].float().mean().item() == pytest.approx(0.3, abs=0.03)
    more = some.masked & ~plain.masked
    assert (some.masked | ~plain.masked).all()
    if kind == "block":
        block = torch.arange(12) // 4
        picked = torch.where(plain.scored, block, 0).amax(dim=-1, keepdim=True)
        earlier = (block < picked) & completion
        assert not more[~earlier].any()
        assert more[earlier].float().mean().item() == pytest.approx(0.3, abs=0.03)
    else:
        assert not more.any()


def test_corrupted_canvas_masking_by_masking():
    tokens, prompt = torch.arange(8).view(2, 4) + 10, torch.tensor([[0, 1, 2], [3, 4, 5]])
    prompt_mask = torch.tensor([[False, True, True], [True, True, True]])
    corruption = corrupt("uniform", ending(4, 2, length=4), prompt_mask, 3, seeded(), p_mask_prompt=0.5)
    canvas = corrupted_canvas(prompt, prompt_mask, tokens, corruption, 99)
    assert len(canvas) == 6 and canvas.steps.tolist() == [0] * 6
    for row, (n, b) in enumerate(itertools.product(range(3), range(2))):
        assert torch.equal(canvas.masked[row], corruption.masked[n, b])
        assert torch.equal(canvas.tokens[row], torch.where(corruption.masked[n, b], 99, tokens[b]))
        assert torch.equal(canvas.prompt[row], torch.where(corruption.prompt_masked[n, b], 99, prompt[b]))
        assert torch.equal(canvas.prompt_mask[row], prompt_mask[b])
    assert (canvas.prompt == 99).any() and 99 not in tokens and 99 not in prompt


@pytest.mark.parametrize(
    ("kind", "maskings", "settings", "part"),
    [
        ("mask", 2, {}, "corruption='mask'.*uniform, bernoulli, coupled, block, full"),
        ("coupled", 3, {}, "maskings=3"),
        ("uniform", 0, {}, "maskings=0"),
        ("block", 2, {"block_length": 5}, "block_length=5.*gen_length=12"),
        ("block", 2, {}, "block_length=None"),
        ("block", 2, {"block_length": -4}, "block_length=-4"),
        ("full", 2, {"p_mask_prompt": 1.0}, r"p_mask_prompt=1\.0"),
        ("full", 2, {"p_mask_prompt": -0.1}, r"p_mask_prompt=-0\.1"),
    ],
)
def test_bad_corruption(kind, maskings, settings, part, completion):
    with pytest.raises(ValueError, match=part):
        draw(kind, completion, maskings, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_without_a_token_is_refused(kind):
    with pytest.raises(ValueError, match=r"completions \[1, 2\] have no token"):
        draw(kind, ending(3, 0, 0, length=12), **KINDS[kind])


# Likelihood surrogates


def random_scores(n: int = 3, rows: int = 5, length: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, weights and what is scored; no masking scores the first token of the first completion."""
    generator = seeded(seed)
    log_prob = -3 * torch.rand(n, rows, length, generator=generator, dtype=torch.float64)
    scored = torch.rand(n, rows, length, generator=generator) < 0.5
    scored[:, 0, 0], scored[0, 0, 1] = False, True
    weight = scored * (0.5 + 3 * torch.rand(n, rows, length, generator=generator, dtype=torch.float64))
    return log_prob * scored, weight, scored


@pytest.mark.parametrize("beta", [1.0, 1.5, 3.0])
def test_surrogates_against_a_loop(beta):
    log_prob, weight, scored = random_scores()
    lower, upper = likelihood.elbo(log_prob, weight), likelihood.eubo(log_prob, weight, scored, beta)
    mixed = likelihood.mixture(log_prob, weight, scored, beta, 0.3)
    for b, i in itertools.product(range(5), range(6)):
        maskings = [n for n in range(3) if scored[n, b, i]]
        weighted = sum(weight[n, b, i].item() * log_prob[n, b, i].item() for n in maskings) / 3
        mean = sum(weight[n, b, i].item() * math.exp(beta * log_prob[n, b, i].item()) for n in maskings) / 3
        bound = math.log(mean) / beta if maskings else 0.0
        assert lower[b, i].item() == pytest.approx(weighted)
        assert upper[b, i].item() == pytest.approx(bound)
        assert mixed[b, i].item() == pytest.approx(0.3 * bound + 0.7 * weighted)


def test_a_token_that_no_masking_scores_drops_out():
    log_prob, weight, scored = random_scores()
    log_prob = log_prob.clone().requires_grad_()
    value = likelihood.eubo(log_prob, weight, scored, 1.5)
    value.sum().backward()
    assert value[0, 0] == 0 and torch.equal(log_prob.grad != 0, scored)
    # The gradient weighs a token's maskings by how likely they make it; per token it is 1.
    torch.testing.assert_close(log_prob.grad.sum(dim=0), scored.any(dim=0).double())
    certain = torch.full_like(log_prob, -200.0).requires_grad_()
    likelihood.eubo(certain, weight, scored, 2.0).sum().backward()
    assert certain.grad.isfinite().all()


def test_order_of_the_bounds_where_weights_average_to_one():
    """Then, token by token, ELBO <= EUBO, rising with beta. Monte Carlo weights average to one in expectation only."""
    log_prob, weight, scored = random_scores(n=4)
    even = (weight / weight.mean(dim=0).clamp(min=1e-9)) * scored
    seen = scored.any(dim=0)
    bounds = [likelihood.elbo(log_prob, even)] + [likelihood.eubo(log_prob, even, scored, b) for b in (1, 1.5, 2, 4)]
    for low, high in itertools.pairwise(bounds):
        assert (high >= low - 1e-12).all() and (high > low + 1e-3)[scored.sum(dim=0) > 1].any()
    assert (bounds[-1] <= log_prob.masked_fill(~scored, -torch.inf).amax(dim=0) / 1 + math.log(4))[seen].all()
    small, large = (likelihood.eubo(log_prob, even * factor, scored, 1.0) for factor in (0.2, 5.0))
    assert (small < likelihood.elbo(log_prob, even * 0.2))[seen].any(), "a mean weight below 1 turns the order round"
    assert (large > likelihood.eubo(log_prob, even * 5.0, scored, 2.0))[seen].any()


def test_of_one_full_masking_all_bounds_are_the_log_probability():
    log_prob = random_scores(n=1)[0]
    ones = torch.ones_like(log_prob)
    for beta in (1.0, 2.0):
        torch.testing.assert_close(likelihood.eubo(log_prob, ones, ones.bool(), beta), log_prob[0])
    torch.testing.assert_close(likelihood.elbo(log_prob, ones), log_prob[0])


def test_renyi_order_below_one_is_refused():
    with pytest.raises(ValueError, match=r"beta=0\.5"):
        likelihood.eubo(*random_scores(), beta=0.5)


# Scores


@pytest.fixture(scope="module")
def early():
    denoiser = load_denoiser("embedded-early", device="cpu", dtype="float32")
    denoiser.model.requires_grad_(True)
    return denoiser


@pytest.fixture(scope="module")
def masked_canvas(early) -> tuple[Canvas, Tensor, Tensor]:
    """Prompts of several lengths, half of the completion masked; targets, and what of it is scored."""
    texts = [make_task(name)[i].prompt for name in ("countdown", "sudoku") for i in range(2)]
    canvas = decoding.blank([torch.tensor(early.tokenizer(t)["input_ids"]) for t in texts], 10, early.mask_token_id)
    targets = torch.randint(5, early.vocab_size, (4, 10), generator=seeded())
    targets[targets == early.mask_token_id] = 7
    canvas.masked = torch.rand(4, 10, generator=seeded(1)) < 0.6
    canvas.tokens = torch.where(canvas.masked, early.mask_token_id, targets)
    scored = canvas.masked & (torch.rand(4, 10, generator=seeded(2)) < 0.7)
    assert not canvas.prompt_mask.all() and 5 < scored.sum() < canvas.masked.sum()
    return canvas, targets, scored


def gradients(denoiser, function) -> list[Tensor]:
    denoiser.model.zero_grad()
    function().backward()
    return [p.grad.clone() for p in denoiser.model.parameters()]


@torch.no_grad()
def test_score_is_the_log_softmax_and_the_centred_logit(early, masked_canvas):
    canvas, targets, scored = masked_canvas
    score = early.score(canvas, targets, scored)
    tokens = torch.cat([canvas.prompt, canvas.tokens], dim=1)
    mask = torch.cat([canvas.prompt_mask, torch.ones_like(canvas.masked)], dim=1)
    logits = early.logits(tokens, mask)[:, -10:].double()
    words = [v for v in range(early.vocab_size) if v != early.mask_token_id]
    for b, i in scored.nonzero().tolist():
        row, target = logits[b, i], logits[b, i, targets[b, i]]
        assert score.log_prob[b, i].item() == pytest.approx((target - row[words].logsumexp(0)).item(), abs=1e-4)
        assert score.centred_logit[b, i].item() == pytest.approx((target - row[words].mean()).item(), abs=1e-4)
    assert not score.log_prob[~scored].any() and not score.centred_logit[~scored].any()
    including = logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]
    assert (score.log_prob - including)[scored].abs().max() > 1e-9, "the mask token does carry probability"


def test_score_of_a_consistent_vocabulary_sums_to_one(early, masked_canvas):
    """Over all words but the mask, whose own logit counts for nothing."""
    canvas, _, scored = masked_canvas
    b, i = scored.nonzero()[0].tolist()
    words = torch.tensor([v for v in range(early.vocab_size) if v != early.mask_token_id])
    rows = canvas[torch.full((len(words),), b)]
    where = torch.zeros_like(rows.masked)
    where[:, i] = True
    with torch.no_grad():
        score = early.score(rows, words[:, None].expand(-1, 10), where)
    assert score.log_prob[:, i].double().exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert score.centred_logit[:, i].double().sum().item() == pytest.approx(0, abs=1e-2)


def test_chunks_change_neither_values_nor_gradients(early, masked_canvas, monkeypatch):
    canvas, targets, scored = masked_canvas
    factors = torch.randn(2, *scored.shape, generator=seeded())
    rows = []
    head = early.head
    monkeypatch.setattr(early, "head", lambda features: rows.append(len(features)) or head(features), raising=False)

    def loss() -> Tensor:
        score = early.score(canvas, targets, scored)
        return (factors[0] * score.log_prob + factors[1] * score.centred_logit).sum()

    whole, wanted = loss().item(), gradients(early, loss)
    assert set(rows) == {int(scored.sum())}
    rows.clear()
    monkeypatch.setattr(base, "CHUNK", 3 * early.vocab_size + 1)
    assert loss().item() == pytest.approx(whole, abs=1e-4)
    rows.clear()
    for gradient, other in zip(gradients(early, loss), wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)
    assert max(rows) == 3 and sum(rows) == 2 * scored.sum(), "a chunk's logits at a time, again in the backward pass"
    assert max(g.abs().max() for g in wanted) > 0.1


@torch.no_grad()
def test_a_scored_row_does_not_depend_on_padding_and_neighbours(early, masked_canvas):
    canvas, targets, scored = masked_canvas
    score = early.score(canvas, targets, scored)
    for b in range(4):
        row = canvas[b : b + 1]
        row.prompt, row.prompt_mask = row.prompt[row.prompt_mask][None], row.prompt_mask[row.prompt_mask][None]
        alone = early.score(row, targets[b : b + 1], scored[b : b + 1])
        torch.testing.assert_close(alone.log_prob[0], score.log_prob[b], atol=2e-5, rtol=0)
        torch.testing.assert_close(alone.centred_logit[0], score.centred_logit[b], atol=2e-5, rtol=0)


def test_nothing_to_score_is_zero_and_still_has_a_gradient(early, masked_canvas):
    canvas, targets, scored = masked_canvas
    score = early.score(canvas, targets, torch.zeros_like(scored))
    assert not score.log_prob.any() and not score.centred_logit.any()
    (score.log_prob.sum() + score.centred_logit.sum()).backward()


# Losses

TOKEN_RATIO = ("diffu-grpo", "unigrpo", "coupled-grpo")
LOSSES = {
    "elbo-pg": (ELBOPGConfig(), elbo_pg_loss),
    "espo": (ESPOConfig(kl_weight=0.3), espo_loss),
    "espo without kl": (ESPOConfig(kl_weight=0.0), espo_loss),
    "diffu-grpo": (DiffuGRPOConfig(clip=0.2), diffu_grpo_loss),
    "unigrpo": (UniGRPOConfig(kl_weight=0.3), unigrpo_loss),
    "coupled-grpo": (CoupledGRPOConfig(kl_weight=0.0), coupled_grpo_loss),
    "wd1": (WD1Config(), wd1_loss),
    **{f"spg {negative}": (SPGConfig(negative=negative), spg_loss) for negative in NEGATIVES},
    **{
        f"gdsd {score} {clip}": (GDSDConfig(score=score, clip=clip, reference_share=0.3, kl_weight=0.2), gdsd_loss)
        for score in SCORES
        for clip in (None, 0.2)
    },
    "gdsd plain": (GDSDConfig(psi=3.0), gdsd_loss),
    "gdsd-tlc": (GDSDTLCConfig(), gdsd_loss),
}
"""Configs and losses under every setting that changes the formula."""


def random_batch(seed: int = 0, spread: float = 0.5) -> Batch:
    """Two coupled maskings of four completions of up to five tokens, float64."""
    generator = seeded(seed)
    completion = ending(5, 3, 1, 4, length=5)
    corruption = corrupt("coupled", completion, torch.ones(4, 2).bool(), 2, generator)
    corruption.weight = corruption.weight.double()

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) * corruption.scored

    new = Score(noise(1.0) - 2 * corruption.scored, noise(1.0))
    old, reference = (Score(*(x + noise(spread) for x in (new.log_prob, new.centred_logit))) for _ in range(2))
    return Batch(
        new=new,
        old=old,
        reference=reference,
        corruption=corruption,
        length=completion.sum(dim=1).double(),
        advantage=torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64),
        weight=torch.tensor([0.25, 0.3, 0.25, 0.2], dtype=torch.float64),
    )


def slow_terms(batch: Batch, config, b: int) -> tuple[float, float]:
    """Loss of a completion and its divergence from the reference, in plain numbers."""
    maskings, positions = range(2), range(5)
    scored = [(n, i) for n in maskings for i in positions if batch.corruption.scored[n, b, i]]
    advantage, length = batch.advantage[b].item(), batch.length[b].item()
    weight = {at: batch.corruption.weight[at[0], b, at[1]].item() for at in scored}

    def values(of: Score, name: str = "log_prob") -> dict:
        return {(n, i): getattr(of, name)[n, b, i].item() for n, i in scored}

    def worse(ratio: float) -> float:
        return min(ratio * advantage, min(max(ratio, 1 - config.clip), 1 + config.clip) * advantage)

    new, old, reference = values(batch.new), values(batch.old), values(batch.reference)
    sums = (sum(weight[at] * of[at] for at in scored) / 2 for of in (new, old, reference))
    elbo = dict(zip(("new", "old", "reference"), sums, strict=True))
    if isinstance(config, ESPOConfig):
        kl = 0.5 * (elbo["new"] - elbo["reference"]) ** 2 / length
        return -worse(math.exp((elbo["new"] - elbo["old"]) / length)), kl
    if isinstance(config, DiffuGRPOConfig | UniGRPOConfig | CoupledGRPOConfig):
        kl = sum(math.exp(reference[at] - new[at]) - (reference[at] - new[at]) - 1 for at in scored)
        return -sum(worse(math.exp(new[at] - old[at])) for at in scored) / len(scored), kl / len(scored)
    if isinstance(config, WD1Config):
        return -advantage * sum(new.values()) / len(scored), 0.0
    if isinstance(config, ELBOPGConfig):
        return -advantage * elbo["new"] / 5, 0.0
    if isinstance(config, SPGConfig):
        terms = {i: [weight[at] * math.exp(config.beta * new[at]) for at in scored if at[1] == i] for i in positions}
        eubo = sum(math.log(sum(t) / 2) / config.beta for t in terms.values() if t)
        mixture = config.omega * eubo + (1 - config.omega) * elbo["new"]
        negative = {"mixture": mixture, "eubo": eubo, "elbo": elbo["new"], "zero": 0.0}[config.negative]
        return -advantage * (elbo["new"] if advantage > 0 else negative) / 5, 0.0
    name = "centred_logit" if config.score == "centred-logit" else "log_prob"
    square = 0.0
    for n in maskings:

        def score(of: Score, n=n) -> float:
            factor = weight if config.score == "published-tlc" else dict.fromkeys(scored, 1.0)
            return sum(factor[at] * value for at, value in values(of, name).items() if at[0] == n)

        share = config.reference_share
        difference = score(batch.new) - (1 - share) * score(batch.old) - share * score(batch.reference)
        if config.clip:
            difference = min(max(difference / 5, math.log(1 - config.clip)), math.log(1 + config.clip))
        square += (difference - config.psi * advantage) ** 2 / 2
    return square, sum(0.5 * (new[at] - reference[at]) ** 2 for at in scored) / len(scored)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_against_plain_numbers(name):
    config, loss = LOSSES[name]
    batch = random_batch()
    value, metrics = loss(batch, config)
    expected = 0.0
    for b, weight in enumerate(batch.weight.tolist()):
        term, kl = slow_terms(batch, config, b)
        expected += weight * (term + getattr(config, "kl_weight", 0.0) * kl)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert all(metric.ndim == 0 and metric.isfinite() for metric in metrics.values())
    if getattr(config, "clip", None):
        assert 0.05 < metrics["clip_fraction"] < 0.95, "clipped and not, both"
    if not getattr(config, "kl_weight", 1.0):
        assert "kl" not in metrics


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name):
    config, loss = LOSSES[name]
    batch = random_batch()
    scored = batch.corruption.scored

    def function(log_prob: Tensor, centred: Tensor) -> Tensor:
        return loss(replace(batch, new=Score(log_prob * scored, centred * scored)), config)[0]

    inputs = [x.clone().requires_grad_() for x in (batch.new.log_prob, batch.new.centred_logit)]
    assert torch.autograd.gradcheck(function, inputs)
    log_prob, centred = torch.autograd.grad(function(*inputs), inputs, materialize_grads=True)
    uses = "centred" if getattr(config, "score", "") == "centred-logit" else "log-prob"
    assert centred.any() == (uses == "centred")
    assert log_prob.any() == (uses == "log-prob" or config.kl_weight > 0)


def gradient_of(loss, config, batch: Batch) -> Tensor:
    log_prob = batch.new.log_prob.clone().requires_grad_()
    loss(replace(batch, new=Score(log_prob, batch.new.centred_logit)), config)[0].backward()
    return log_prob.grad


@pytest.mark.parametrize("name", [*TOKEN_RATIO, "espo"])
def test_ratio_losses_start_as_the_plain_policy_gradient(name):
    """At new = old = reference: nothing is clipped, the divergence has no gradient."""
    config, loss = LOSSES[name]
    batch = random_batch(spread=0.0)
    scored, factor = batch.corruption.scored, -(batch.weight * batch.advantage)[:, None]
    if name == "espo":
        expected = factor * batch.corruption.weight / (2 * batch.length[:, None])
    else:
        expected = factor * scored / scored.sum(dim=(0, 2))[:, None]
    torch.testing.assert_close(gradient_of(loss, config, batch), expected.double(), atol=1e-7, rtol=1e-6)
    assert loss(batch, config)[1]["clip_fraction"] == 0


@pytest.mark.parametrize("name", TOKEN_RATIO)
def test_a_clipped_token_has_no_gradient(name):
    """Only on the side where the ratio has already gone the right way."""
    config, loss = LOSSES[name]
    config, batch = replace(config, kl_weight=0.0), random_batch()
    scored, advantage = batch.corruption.scored, batch.advantage[:, None]
    ratios = (batch.new.log_prob - batch.old.log_prob).exp()
    far = torch.where(advantage > 0, ratios > 1 + config.clip, ratios < 1 - config.clip) & scored
    gradient = gradient_of(loss, config, batch)
    assert torch.equal(gradient != 0, scored & ~far) and far.any()
    wrong = torch.where(advantage > 0, ratios < 1 - config.clip, ratios > 1 + config.clip) & scored
    assert (gradient[wrong] != 0).all() and wrong.any()


def test_clipped_by_hand():
    log_ratio = torch.tensor([1.0, 1.2, 2.0, 2.0, 0.25, 0.25]).log()
    advantage = torch.tensor([3.0, 1.0, 1.0, -1.0, 2.0, -2.0])
    objective, outside = ratio.clipped(log_ratio, advantage, 0.5)
    torch.testing.assert_close(objective, torch.tensor([3.0, 1.2, 1.5, -2.0, 0.5, -1.0]))
    assert outside.tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_the_upper_bound_spares_maskings_that_make_a_bad_token_unlikely(beta):
    """What SPG is about: lowering the ELBO pushes all maskings alike, lowering the EUBO only the likely ones."""
    batch = random_batch()
    scored = torch.ones_like(batch.corruption.scored)
    corruption = replace(batch.corruption, scored=scored, weight=scored.double())
    log_prob = torch.stack([torch.full((4, 5), -0.1), torch.full((4, 5), -8.0)]).double()
    batch = replace(batch, corruption=corruption, new=Score(log_prob, log_prob), advantage=-torch.ones(4).double())
    lower, upper = (
        gradient_of(spg_loss, SPGConfig(negative=negative, beta=beta), batch) for negative in ("elbo", "eubo")
    )
    torch.testing.assert_close(lower[0], lower[1])
    torch.testing.assert_close(upper.sum(dim=0), lower.sum(dim=0))
    assert (upper[1] < 1e-3 * upper[0]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_microbatches_add_up(name):
    config, loss = LOSSES[name]
    batch = random_batch()

    def part(rows) -> Batch:
        def take(of: Score) -> Score:
            return Score(of.log_prob[:, rows], of.centred_logit[:, rows])

        fields = {k: getattr(batch, k)[rows] for k in ("corruption", "length", "advantage", "weight")}
        return Batch(new=take(batch.new), old=take(batch.old), reference=take(batch.reference), **fields)

    whole, metrics = loss(batch, config)
    parts = [loss(part(torch.tensor(rows)), config) for rows in ([0, 3], [1, 2])]
    assert sum(value for value, _ in parts).item() == pytest.approx(whole.item())
    for metric, value in metrics.items():
        assert sum(more[metric] for _, more in parts).item() == pytest.approx(value.item())
    split = torch.zeros(2, 4, 5, dtype=torch.float64)
    for rows in ([0, 3], [1, 2]):
        if loss is not gdsd_loss or config.score != "centred-logit" or config.kl_weight:
            split[:, rows] = gradient_of(loss, config, part(torch.tensor(rows)))
            wanted = gradient_of(loss, config, batch)[:, rows]
            torch.testing.assert_close(split[:, rows], wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_weight_zero_excludes_a_completion(name):
    config, loss = LOSSES[name]
    batch = random_batch()
    batch.weight[1] = 0.0
    other = random_batch()
    other.weight[1], other.advantage[1] = 0.0, 7.0
    other.new.log_prob[:, 1] -= 1.0 * other.corruption.scored[:, 1]
    other.new.centred_logit[:, 1] += 1.0 * other.corruption.scored[:, 1]
    value, metrics = loss(batch, config)
    same, same_metrics = loss(other, config)
    assert same.item() == pytest.approx(value.item()) and set(same_metrics) == set(metrics)
    for metric, figure in metrics.items():
        assert same_metrics[metric].item() == pytest.approx(figure.item()), metric


def scored_batch(denoiser: TabularDenoiser, tokens: Tensor, config, reward: Tensor, seed: int = 0) -> Batch:
    """As the trainer makes it, at new = old = reference; the prompts are one token, which a table does not read."""
    kind, completion = config.corruption, torch.ones_like(tokens).bool()
    prompt = torch.zeros(len(tokens), 1, dtype=torch.int64)
    prompt_mask = torch.ones_like(prompt).bool()
    corruption = corrupt(kind.kind, completion, prompt_mask, kind.maskings, seeded(seed), p_mask_prompt=0.1)
    canvas = corrupted_canvas(prompt, prompt_mask, tokens, corruption, denoiser.mask_token_id)
    score = denoiser.score(canvas, tokens.repeat(kind.maskings, 1), corruption.scored.flatten(0, 1))
    new = Score(*(x.unflatten(0, (kind.maskings, -1)) for x in (score.log_prob, score.centred_logit)))
    frozen = Score(new.log_prob.detach(), new.centred_logit.detach())
    return Batch(
        new=new,
        old=frozen,
        reference=frozen,
        corruption=corruption,
        length=completion.sum(dim=1).float(),
        advantage=config.advantages(reward[None])[0],
        weight=torch.full((len(tokens),), 1 / len(tokens)),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_raises_what_was_good_and_lowers_what_was_bad(name):
    """On a table, by the exact likelihood of decoding in random order and by the exact bound."""
    config, loss = LOSSES[name]
    tokens = torch.tensor([[2, 0, 1], [0, 1, 2]])
    denoiser = TabularDenoiser.random(3, 3, seed=3)
    optimizer = torch.optim.SGD(denoiser.model.parameters(), lr=0.05)

    def values() -> Tensor:
        with torch.no_grad():
            return torch.stack([f(denoiser, tokens) for f in (random_order_log_likelihood, exact_elbo)])

    before = values()
    for seed in range(40):
        optimizer.zero_grad()
        batch = scored_batch(denoiser, tokens, config, torch.tensor([1.0, 0.0]), seed)
        assert batch.advantage[0] > 0 > batch.advantage[1]
        loss(batch, config)[0].backward()
        optimizer.step()
    rose = values() - before
    assert (rose[:, 0] > 0.01).all() and (rose[:, 1] < -0.01).all(), rose


def test_no_advantage_of_spg_zero_has_no_gradient():
    batch = replace(random_batch(), advantage=-torch.ones(4, dtype=torch.float64))
    assert not gradient_of(spg_loss, SPGConfig(negative="zero"), batch).any()


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (SPGConfig(negative="none"), "negative='none'.*mixture, eubo, elbo, zero"),
        (SPGConfig(beta=0.5), r"beta=0\.5"),
        (SPGConfig(omega=1.5), r"omega=1\.5"),
        (GDSDConfig(score="logit"), "score='logit'.*log-prob"),
        (GDSDConfig(reference_share=1.1), r"reference_share=1\.1"),
        (GDSDConfig(clip=0.0), r"clip=0\.0"),
        (ESPOConfig(clip=0.0), r"clip=0\.0"),
        (DiffuGRPOConfig(kl_weight=-1.0), r"kl_weight=-1\.0"),
        (UniGRPOConfig(clip=-1.0), r"clip=-1\.0"),
        (CoupledGRPOConfig(clip=-1.0), r"clip=-1\.0"),
        (WD1Config(psi=0.0), r"psi=0\.0"),
    ],
)
def test_bad_objectives(config, part):
    with pytest.raises(ValueError, match=part):
        config.check()


def test_unknown_objective():
    with pytest.raises(ValueError, match=r"objective='sgp'.*spg, gdsd, "):
        load_objective("sgp")


# What GDSD converges to

ADVANTAGE = torch.tensor([1.0, -0.4, 0.3, -1.2], dtype=torch.float64)
OLD = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
SHARE, PSI = 0.3, 0.8


def regress(score: str, advantage: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Probabilities of one masked token that minimise GDSD's loss over all four words, and the loss there."""
    config = GDSDConfig(score=score, psi=PSI, reference_share=SHARE)
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    corruption = Corruption(ones.bool(), ones.bool(), ones, torch.zeros(1, 4, 1).bool())
    logits = OLD.clone().requires_grad_()

    def score_of(logits: Tensor) -> Score:  # [1, 4, 1]: completion v is word v
        return Score(logits.log_softmax(dim=0).view(1, 4, 1), (logits - logits.mean()).view(1, 4, 1))

    def loss() -> Tensor:
        fields = {"length": torch.ones(4), "advantage": advantage, "weight": weight, "corruption": corruption}
        batch = Batch(new=score_of(logits), old=score_of(OLD), reference=score_of(REFERENCE), **fields)
        return gdsd_loss(batch, config)[0]

    optimizer = torch.optim.Adam([logits], lr=0.02)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return logits.detach().softmax(dim=0), loss().item()


def teacher(advantage: Tensor) -> tuple[Tensor, float]:
    """``p_old^(1-b) p_ref^b exp(psi A) / Z`` and log Z."""
    lifted = (1 - SHARE) * OLD + SHARE * REFERENCE + PSI * advantage
    return lifted.softmax(dim=0), lifted.logsumexp(dim=0).item()


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


EVEN = torch.full((4,), 0.25, dtype=torch.float64)


def test_gdsd_reaches_the_teacher_once_the_normaliser_is_in_the_advantage():
    wanted, log_normaliser = teacher(ADVANTAGE)
    reached, loss = regress("log-prob", ADVANTAGE - log_normaliser / PSI, OLD.exp())
    assert total_variation(reached, wanted) < 1e-4 and loss < 1e-7
    assert total_variation(wanted, OLD.exp()) > 0.1


def test_gdsd_tlc_reaches_the_teacher_on_uniformly_centred_advantages():
    centred = ADVANTAGE - ADVANTAGE.mean()
    wanted, _ = teacher(ADVANTAGE)
    for weight in (EVEN, OLD.exp()):
        reached, loss = regress("centred-logit", centred, weight)
        assert total_variation(reached, wanted) < 1e-4 and loss < 1e-7


def test_gdsd_elsewhere_is_close_to_the_teacher_not_equal():
    """Advantages centred by what is sampled, which is what a group's mean comes to."""
    advantage = ADVANTAGE - (OLD.exp() * ADVANTAGE).sum()
    wanted, _ = teacher(advantage)
    start = total_variation(OLD.exp(), wanted)
    for score in ("log-prob", "centred-logit"):
        reached, loss = regress(score, advantage, OLD.exp())
        distance = total_variation(reached, wanted)
        print(f"{score}: total variation {distance:.3f} from the teacher, {start:.3f} at the start, loss {loss:.4f}")
        assert 1e-3 < distance < 0.5 * start and loss > 1e-4


# Advantages


def test_leave_one_out():
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.1], [0.3] * 4])
    expected = [[r - (sum(row) - r) / 3 for r in row] for row in reward.tolist()]
    torch.testing.assert_close(group_advantages(reward, "leave-one-out"), torch.tensor(expected))
    torch.testing.assert_close(group_advantages(reward, "leave-one-out"), 4 / 3 * group_advantages(reward))


@pytest.mark.parametrize("baseline", ["group-mean", "leave-one-out"])
@pytest.mark.parametrize("divide_by_std", [False, True])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_left_out(broken, divide_by_std, baseline):
    reward = torch.tensor([[1.0, broken, 0.5, 0.0], [broken, broken, 0.7, broken], [broken] * 4, [1.0, 0.0, 0.0, 0.0]])
    advantage = group_advantages(reward, baseline, divide_by_std)
    kept = group_advantages(reward[:1, [0, 2, 3]], baseline, divide_by_std)
    torch.testing.assert_close(advantage[0, [0, 2, 3]], kept[0])
    assert advantage[0, 1] == 0 and not advantage[1:3].any()
    torch.testing.assert_close(advantage[3:], group_advantages(reward[3:], baseline, divide_by_std))


def test_standard_deviation_is_that_of_the_sample():
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.1]])
    torch.testing.assert_close(
        group_advantages(reward, divide_by_std=True), (reward - reward.mean()) / reward.std(), atol=1e-4, rtol=0
    )


def test_bad_groups():
    with pytest.raises(ValueError, match="group=1"):
        group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"baseline='mean'.*group-mean, leave-one-out"):
        group_advantages(torch.zeros(3, 2), "mean")


@pytest.mark.parametrize("psi", [1.0, 4.0])
def test_wd1_weights(psi):
    config, reward = WD1Config(psi=psi), torch.tensor([[1.0, 0.0, 0.5, 0.1], [0.3] * 4])
    weights = config.advantages(reward)
    centred = [r - 0.4 for r in reward[0].tolist()]
    plus, minus = ([math.exp(sign * psi * a) for a in centred] for sign in (1, -1))
    expected = [4 * (p / sum(plus) - m / sum(minus)) for p, m in zip(plus, minus, strict=True)]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-4)
    assert weights[1].tolist() == [0] * 4 and weights[0].sum().item() == pytest.approx(0, abs=1e-5)
    assert weights[0, 0] > 0 > weights[0, 1]


def test_wd1_leaves_out_what_is_no_number():
    reward = torch.tensor([[1.0, math.nan, 0.5, math.inf], [math.nan] * 4])
    weights = WD1Config().advantages(reward)
    torch.testing.assert_close(weights[:1, [0, 2]], WD1Config().advantages(reward[:1, [0, 2]]))
    assert not weights[0, [1, 3]].any() and not weights[1].any()
