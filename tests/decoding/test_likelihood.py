"""Likelihood surrogates, and what a denoiser says of given tokens."""

import itertools
import math

import pytest
import torch
from masked import seeded
from torch import Tensor
from torch.nn.functional import dropout

from dllm_gym import decoding, load_denoiser, make_task
from dllm_gym.decoding import likelihood
from dllm_gym.denoisers import base
from dllm_gym.types import Canvas, TokenSampling

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


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_score_is_the_log_softmax_and_the_centred_logit(early, masked_canvas, temperature):
    canvas, targets, scored = masked_canvas
    score = early.score(canvas, targets, scored, temperature)
    tokens = torch.cat([canvas.prompt, canvas.tokens], dim=1)
    mask = torch.cat([canvas.prompt_mask, torch.ones_like(canvas.masked)], dim=1)
    logits = early.logits(tokens, mask, prompt_length=canvas.prompt_mask.sum(dim=1))[:, -10:].double() / temperature
    words = [v for v in range(early.vocab_size) if v != early.mask_token_id]
    for b, i in scored.nonzero().tolist():
        row, target = logits[b, i], logits[b, i, targets[b, i]]
        assert score.log_prob[b, i].item() == pytest.approx((target - row[words].logsumexp(0)).item(), abs=1e-4)
        assert score.centred_logit[b, i].item() == pytest.approx((target - row[words].mean()).item(), abs=1e-4)
    assert not score.log_prob[~scored].any() and not score.centred_logit[~scored].any()
    including = logits.log_softmax(dim=-1).gather(2, targets[..., None])[..., 0]
    assert (score.log_prob - including)[scored].abs().max() > 1e-9, "the mask token does carry probability"


def test_what_is_drawn_is_scored_at_the_same_temperature(early, masked_canvas):
    canvas = masked_canvas[0]
    uniforms = torch.rand(canvas.masked.shape, generator=seeded(3))
    drawn = early.predict(canvas, sampling=TokenSampling(0.7), uniforms=uniforms)
    score = early.score(canvas, drawn.token, canvas.masked, 0.7)
    torch.testing.assert_close(score.log_prob, drawn.draw_log_prob, atol=1e-4, rtol=0)
    assert score.log_prob.min() < -1, "not all were certain"


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


def test_a_head_with_dropout_is_recomputed_with_the_same_dropout(early, masked_canvas, monkeypatch):
    said: list[Tensor] = []
    monkeypatch.setattr(base, "CHUNK", 3 * early.vocab_size)
    monkeypatch.setattr(early, "head", lambda x, head=early.head: said.append(dropout(head(x))) or said[-1])
    early.score(*masked_canvas).log_prob.sum().backward()
    forward, again = said[: len(said) // 2], said[len(said) // 2 :]
    assert len(forward) > 1 and all(any(torch.equal(x, y) for y in again) for x in forward)


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
