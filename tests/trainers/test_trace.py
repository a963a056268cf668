"""The trajectory's likelihood: its estimate, its gradient, and the objectives on it."""

from dataclasses import replace

import pytest
import torch
from masked import seeded

from dllm_gym import decoding, load_denoiser
from dllm_gym.agents import collect
from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.samplers.rollout import play
from dllm_gym.agents.samplers.spec import make_sampler
from dllm_gym.agents.trainers.denoiser.objective import Batch, CorruptionConfig
from dllm_gym.agents.trainers.denoiser.trace import (
    StepsConfig,
    TraceGRPOConfig,
    TracePGConfig,
    trace_grpo_loss,
    trace_pg_loss,
)
from dllm_gym.agents.trainers.denoiser.trainer import trajectories
from dllm_gym.decoding import likelihood
from dllm_gym.decoding.corruption import Corruption, corrupted_canvas
from dllm_gym.decoding.trajectory import Trajectories, doubt, draw_steps, sample_steps
from dllm_gym.denoisers.enumeration import (
    log_likelihood_of_orders,
    random_order_log_likelihood,
    sampling_distribution,
)
from dllm_gym.denoisers.oracle import TabularDenoiser
from dllm_gym.eval.benchmarks.exactness import policy_gradients
from dllm_gym.types import Action, Score

SAMPLERS = [
    "threshold:threshold=0.4",
    "confidence:k=1",
    "confidence:k=3",
    "left-to-right:k=2",
    "entropy-bounded:gamma=0.5",
]


def written_out(denoiser: TabularDenoiser, sampler, block_length: int) -> tuple[torch.Tensor, Trajectories]:
    """All completions, and how a sampler that draws nothing would have written each."""
    x = denoiser.sequences()
    canvas = decoding.blank([torch.zeros(1, dtype=torch.int64)] * len(x), denoiser.length, denoiser.mask_token_id)
    parts = []
    while canvas.masked.any():
        seen = decoding.observe(canvas, denoiser.predict(canvas), block_length)
        chosen = decoding.with_best(sampler(seen), seen) & seen.eligible
        rows = canvas.masked.any(dim=1).nonzero()[:, 0]
        parts.append((rows, canvas.masked[rows], chosen[rows]))
        canvas = decoding.commit(
            canvas, replace(seen, token=x), Action.unmasking(chosen), mask_token_id=denoiser.mask_token_id,
            eos_token_id=denoiser.eos_token_id, eos_token_ids=None,
        )  # fmt: skip
    episode, masked, written = (torch.cat(values) for values in zip(*parts, strict=True))
    order = episode.argsort(stable=True)
    sizes = torch.rand(len(order), generator=seeded(len(order)))  # any sizes must do
    return x, Trajectories(masked[order], written[order], episode[order], sizes)


def batch_of(denoiser, x, steps: Trajectories, config, advantage, weight, seed: int = 0) -> Batch:
    """As the learner makes it, at new = old."""
    prompt = torch.zeros(len(x), 1, dtype=torch.int64)
    mask = torch.ones_like(prompt).bool()
    corruption = sample_steps(steps, mask, config.trace.steps, seeded(seed), config.trace.merge)
    canvas = corrupted_canvas(prompt, mask, x, corruption, denoiser.mask_token_id)
    n = len(corruption.masked)
    score = denoiser.score(canvas, x.repeat(n, 1), corruption.scored.flatten(0, 1))
    new = Score(*(values.unflatten(0, (n, -1)) for values in (score.log_prob, score.centred_logit)))
    frozen = Score(new.log_prob.detach(), new.centred_logit.detach())
    return Batch(
        new=new, old=frozen, reference=None, corruption=corruption, length=torch.full((len(x),), x.shape[1]).float(),
        advantage=advantage, weight=weight,
    )  # fmt: skip


@pytest.mark.parametrize("sizes", ["alike", "random", "one", "nothing"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_drawn_steps_estimate_the_sum_of_all(sizes, steps):
    counts = torch.tensor([3, 1, 5])
    values = torch.tensor([[0.0, 1, 2, 0, 0], [3, 0, 0, 0, 0], [4, 5, 6, 7, 8]])
    size = {
        "alike": torch.ones(3, 5),
        "random": torch.rand(3, 5, generator=seeded(0)),
        "one": torch.eye(5)[:3],
        "nothing": torch.zeros(3, 5),
    }[sizes]
    many = 2000
    chosen, weight = draw_steps(size.repeat(many, 1), counts.repeat(many), steps, seeded(steps))
    assert torch.equal((weight > 0).sum(dim=0), counts.clamp(max=steps).repeat(many))
    assert (chosen[weight > 0] < counts.repeat(many).expand_as(chosen)[weight > 0]).all()
    assert (chosen.sort(dim=0).values.diff(dim=0) > 0).all()  # none twice
    estimates = (weight * values.repeat(many, 1).T.gather(0, chosen)).sum(dim=0).view(many, 3)
    error = estimates.std(dim=0) / many**0.5
    assert ((estimates.mean(dim=0) - values.sum(dim=1)).abs() <= 4 * error + 1e-5).all()


def test_steps_are_drawn_in_proportion_to_their_size():
    """Whose estimate of the sum of the sizes themselves is then nearly exact, where steps drawn alike are far off."""
    size = torch.tensor([[8.0, 0.5, 0.1, 4.0, 0.0, 1.0, 0.4, 2.0]]).repeat(500, 1)
    spread = []
    for by in (size, torch.ones_like(size)):
        chosen, weight = draw_steps(by, torch.full((500,), 8), 2, seeded(0))
        spread.append(float((weight * size.T.gather(0, chosen)).sum(dim=0).std()))
    assert spread[0] < 0.2 * spread[1]


def test_doubt_is_what_is_left_of_a_tokens_probability():
    probability = torch.tensor([[0.7, 0.9, 0.2]])
    written = torch.tensor([[True, True, False]])
    torch.testing.assert_close(doubt(probability, written, 1.0), torch.tensor([0.4]))
    cold = 0.09 / (0.49 + 0.09) + 0.01 / (0.81 + 0.01)  # squared and normalised
    torch.testing.assert_close(doubt(probability, written, 0.5), torch.tensor([cold]))
    assert torch.equal(doubt(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool(), 0.01), torch.ones(1))


@pytest.mark.parametrize("block_length", [4, 2])
@pytest.mark.parametrize("text", SAMPLERS)
def test_the_trajectorys_likelihood_is_the_probability_of_being_sampled(text, block_length):
    """Of every completion, for a denoiser that comes from no joint distribution; the sampler is deterministic."""
    denoiser, sampler = TabularDenoiser.random(3, 4, seed=1), make_sampler(text)
    x, steps = written_out(denoiser, sampler, block_length)
    config = TracePGConfig(trace=StepsConfig(steps=6))
    with torch.no_grad():
        batch = batch_of(denoiser, x, steps, config, torch.ones(len(x)), torch.ones(len(x)))
    log_p = likelihood.elbo(batch.new.log_prob, batch.corruption.weight).sum(dim=1)
    torch.testing.assert_close(
        log_p.exp().double(), sampling_distribution(denoiser, sampler, block_length), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["pg", "grpo token", "grpo step"])
@pytest.mark.parametrize("text", SAMPLERS[:3])
def test_the_expected_gradient_is_the_policy_gradient(text, kind):
    """Against finite differences of the expected reward under the sampler's exact distribution."""
    denoiser, sampler = TabularDenoiser.random(3, 4, seed=2), make_sampler(text)
    x, steps = written_out(denoiser, sampler, 4)
    reward = (torch.rand(len(x), generator=seeded(3), dtype=torch.float64) < 0.3).double()
    probability = sampling_distribution(denoiser, sampler)
    advantage = reward - (probability * reward).sum()
    trace = StepsConfig(steps=6)
    config = TracePGConfig(trace=trace) if kind == "pg" else TraceGRPOConfig(trace=trace, level=kind.split()[1])
    loss = trace_pg_loss if kind == "pg" else trace_grpo_loss
    batch = batch_of(denoiser, x, steps, config, advantage.float(), probability.float())
    table = denoiser.model.table
    (gradient,) = torch.autograd.grad(-loss(batch, config)[0] * x.shape[1], table)
    for seed in range(4):
        direction = torch.randn(table.shape, generator=seeded(10 + seed), dtype=table.dtype)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                table += sign * 1e-3 * direction
                values.append(float((sampling_distribution(denoiser, sampler) * reward).sum()))
                table -= sign * 1e-3 * direction
        assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-3, abs=2e-6)


def test_a_sample_of_steps_is_unbiased():
    denoiser = TabularDenoiser.random(3, 4, seed=1)
    x, steps = written_out(denoiser, make_policy("threshold", threshold=0.5), 4)
    lengths = torch.bincount(steps.episode)
    assert len(lengths.unique()) > 1
    values = torch.rand(steps.masked.shape, generator=seeded(0), dtype=torch.float64)  # of a token at its step
    whole = torch.zeros(len(x), dtype=torch.float64).index_add(0, steps.episode, (values * steps.written).sum(dim=1))
    by_token = torch.zeros_like(values[: len(x)]).index_add(0, steps.episode, values * steps.written)
    mask, generator, draws = torch.ones(len(x), 1).bool(), seeded(1), 3000
    for n in (1, 2, 3, 9):
        estimates = []
        for _ in range(draws if n < 4 else 1):
            drawn = sample_steps(steps, mask, n, generator)
            assert drawn.masked.shape == (n, len(x), 4) and not (drawn.scored & ~drawn.masked).any()
            taken = drawn.scored.flatten(2).any(dim=2).sum(dim=0)
            assert torch.equal(taken, lengths.clamp(max=n))
            estimates.append(likelihood.elbo(by_token * drawn.scored, drawn.weight).sum(dim=1))
        mean = torch.stack(estimates).mean(dim=0)
        tolerance = 1e-6 if n == 9 else 0.15
        torch.testing.assert_close(mean, whole, rtol=0, atol=tolerance)


def test_merged_steps_are_scored_on_the_canvas_of_the_first():
    denoiser = TabularDenoiser.random(3, 4, seed=1)
    x, steps = written_out(denoiser, make_policy("confidence"), 4)
    drawn = sample_steps(steps, torch.ones(len(x), 1).bool(), 2, seeded(0), merge=2)
    assert (drawn.scored.sum(dim=2) == 2).all() and (drawn.weight[drawn.scored] == 2).all()
    assert sorted(drawn.masked.sum(dim=2)[:, 0].tolist()) == [2, 4]
    assert (drawn.scored.sum(dim=0) == 1).all()  # both groups of every episode
    odd = sample_steps(steps, torch.ones(len(x), 1).bool(), 2, seeded(0), merge=3)
    assert sorted(odd.scored.sum(dim=2)[:, 0].tolist()) == [1, 3]


def test_orders_one_by_one():
    denoiser = TabularDenoiser.random(3, 3, seed=4)
    x = denoiser.sequences()
    orders = log_likelihood_of_orders(denoiser, x)
    assert orders.shape == (27, 6)
    torch.testing.assert_close(orders.exp().mean(dim=-1).log(), random_order_log_likelihood(denoiser, x))
    torch.testing.assert_close(orders.exp().sum(dim=0), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_no_other_objective_has_the_true_direction_for_an_inconsistent_denoiser(seed):
    denoiser = TabularDenoiser.random(4, 3, seed)
    reward = (torch.rand(64, generator=seeded(0), dtype=torch.float64) < 0.2).double()
    gradients = policy_gradients(denoiser, reward, 1.0, 0.5)
    cosines = {n: torch.cosine_similarity(g, gradients["true"], dim=0).item() for n, g in gradients.items()}
    assert cosines["trace-pg"] > 1 - 1e-9
    assert max(cosines[name] for name in ("elbo-pg", "spg mixture", "spg eubo", "spg zero")) < 0.98


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("text", ["threshold:threshold=0.7", "random:k=2"])
def test_a_rollouts_record_gives_its_log_likelihood(text, block_length):
    """Of the embedded denoiser, at a temperature, with ends; against what the environment kept of the draws."""
    denoiser = load_denoiser("embedded-early", dtype="float32")
    config = EnvConfig("MaskedDiffusion-Countdown-v0", temperature=1.0, block_length=block_length, num_envs=8)
    env, sampler = make_env(config, denoiser=denoiser), make_sampler(text)
    rollout = collect(env, sampler, list(range(8)), seed=3, explore=False)
    infos = {one.number: one.end.info for one in play(env, sampler, list(range(8)), seed=3)}
    steps = trajectories(rollout, "best", 1.0)
    prompt, prompt_mask = decoding.pad_left([env.unwrapped.episodes.encode_prompt(p) for p in rollout.problems])
    drawn = sample_steps(steps, prompt_mask, 12, seeded(0))
    canvas = corrupted_canvas(prompt, prompt_mask, rollout.tokens, drawn, denoiser.mask_token_id)
    with torch.no_grad():
        score = denoiser.score(canvas, rollout.tokens.repeat(12, 1), drawn.scored.flatten(0, 1))
    log_p = likelihood.elbo(score.log_prob.unflatten(0, (12, -1)), drawn.weight).sum(dim=1)
    kept = torch.tensor([infos[n]["log_likelihood"] for n in range(8)])
    torch.testing.assert_close(log_p, kept, rtol=0, atol=2e-3)


@pytest.mark.parametrize("level", ["token", "step"])
def test_the_clip(level):
    """Two tokens in a step, ratios 1.5 and 1.1; by hand."""
    ones = torch.ones(1, 1, 2, dtype=torch.float64)
    new = torch.tensor([[[1.5, 1.1]]], dtype=torch.float64).log()
    batch = Batch(
        new=Score(new, new), old=Score(0 * new, 0 * new), reference=None,
        corruption=Corruption(ones.bool(), ones.bool(), ones, torch.zeros(1, 1, 1).bool()),
        length=torch.tensor([2.0]), advantage=torch.tensor([2.0], dtype=torch.float64), weight=torch.ones(1).double(),
    )  # fmt: skip
    loss, metrics = trace_grpo_loss(batch, TraceGRPOConfig(level=level, clip=0.2))
    expected = (1.2 + 1.1) * 2 / 2 if level == "token" else 1.2 * 2 / 2
    assert float(loss) == pytest.approx(-expected)
    assert float(metrics["clip_fraction"]) == pytest.approx(0.5 if level == "token" else 1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TracePGConfig(trace=StepsConfig(steps=0)), "steps=0: must be 1 or more"),
        (TracePGConfig(trace=StepsConfig(merge=0)), "merge=0: must be 1 or more"),
        (TracePGConfig(corruption=CorruptionConfig("block")), "give --trace.steps instead"),
        (TraceGRPOConfig(clip=0.0), "clip=0.0: must be above 0"),
        (TraceGRPOConfig(level="episode"), "level='episode': must be 'token' or 'step'"),
        (TracePGConfig(sampler="metropolis:steps=2"), "proposes whole completions"),
        (
            TracePGConfig(env=EnvConfig("MaskedDiffusion-Sudoku-v0", temperature=0.0)),
            "temperature=0.0: must be above 0",
        ),
        (TracePGConfig(env=EnvConfig("MaskedDiffusion-Sudoku-v0", temperature=1.0, top_p=0.9)), "leave them out"),
    ],
)
def test_what_cannot_be_scored(config, message):
    with pytest.raises(ValueError, match=message):
        config.check()
