"""Corruption: which tokens are masked, which are scored, and what the weighted sum estimates, by enumeration."""

import itertools

import pytest
import torch
from masked import LENGTH, draw, ending, seeded
from torch import Tensor

from dllm_gym.decoding import likelihood
from dllm_gym.decoding.corruption import Corruption, completion_mask, corrupt, corrupted_canvas
from dllm_gym.denoisers.enumeration import exact_block_elbo, exact_eubo
from dllm_gym.denoisers.oracle import TabularDenoiser

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
