"""Losses: against plain numbers, finite differences, and what they converge to."""

import math
from dataclasses import replace

import pytest
import torch
from masked import ending, seeded
from torch import Tensor

from dllm_gym.agents.trainers.denoiser import load_objective, ratio
from dllm_gym.agents.trainers.denoiser.coupled_grpo import CoupledGRPOConfig, coupled_grpo_loss
from dllm_gym.agents.trainers.denoiser.diffu_grpo import DiffuGRPOConfig, diffu_grpo_loss
from dllm_gym.agents.trainers.denoiser.elbo_pg import ELBOPGConfig, elbo_pg_loss
from dllm_gym.agents.trainers.denoiser.espo import ESPOConfig, espo_loss
from dllm_gym.agents.trainers.denoiser.gdsd import SCORES, GDSDConfig, GDSDTLCConfig, gdsd_loss
from dllm_gym.agents.trainers.denoiser.objective import Batch, floored
from dllm_gym.agents.trainers.denoiser.spg import NEGATIVES, SPGConfig, spg_loss
from dllm_gym.agents.trainers.denoiser.trace import (
    LEVELS,
    TraceGRPOConfig,
    TracePGConfig,
    trace_grpo_loss,
    trace_pg_loss,
)
from dllm_gym.agents.trainers.denoiser.unigrpo import UniGRPOConfig, unigrpo_loss
from dllm_gym.agents.trainers.denoiser.wd1 import WD1Config, wd1_loss
from dllm_gym.decoding.corruption import Corruption, corrupt, corrupted_canvas
from dllm_gym.denoisers.enumeration import exact_elbo, random_order_log_likelihood
from dllm_gym.denoisers.oracle import TabularDenoiser
from dllm_gym.types import Score

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
    "trace-pg": (TracePGConfig(), trace_pg_loss),
    "trace-pg entropy": (TracePGConfig(entropy_weight=0.3), trace_pg_loss),
    "trace-grpo entropy": (TraceGRPOConfig(entropy_weight=0.3), trace_grpo_loss),
    **{f"trace-grpo {level}": (TraceGRPOConfig(level=level), trace_grpo_loss) for level in LEVELS},
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

    def worse(ratio: float, advantage: float = advantage) -> float:
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
    if isinstance(config, TraceGRPOConfig) and config.level == "token":
        surprise = {at: -config.entropy_weight * old[at] for at in scored}
        terms = [weight[at] * worse(math.exp(new[at] - old[at]), advantage + surprise[at]) for at in scored]
        return -sum(terms) / 2 / 5, 0.0
    if isinstance(config, TraceGRPOConfig):
        steps = [[at for at in scored if at[0] == n] for n in maskings]
        terms = [max(weight[at] for at in s) * worse(math.exp(sum(new[at] - old[at] for at in s))) for s in steps if s]
        return -sum(terms) / 2 / 5, 0.0
    if isinstance(config, TracePGConfig):
        terms = [weight[at] * (advantage - config.entropy_weight * new[at] / 2) * new[at] for at in scored]
        return -sum(terms) / 2 / 5, 0.0
    if isinstance(config, ELBOPGConfig):
        return -advantage * elbo["new"] / 5, 0.0
    if isinstance(config, SPGConfig):
        terms = {i: [weight[at] * math.exp(config.beta * new[at]) for at in scored if at[1] == i] for i in positions}
        eubo = sum(math.log(sum(t) / 2) / config.beta for t in terms.values() if t)
        mixture = config.omega * eubo + (1 - config.omega) * elbo["new"]
        negative = {"mixture": mixture, "eubo": eubo, "elbo": elbo["new"]}[config.negative]
        return -advantage * (elbo["new"] if advantage > 0 else negative) / 5, 0.0
    name = "centred_logit" if config.score == "centred-logit" else "log_prob"
    square = 0.0
    for n in maskings:

        def score(of: Score, n=n) -> float:
            factor = weight if config.score == "elbo" else dict.fromkeys(scored, 1.0)
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


def test_a_floor_holds_the_tokens_of_bad_completions_only():
    """At or above it nothing changes; below it a bad token is constant, and a good one is raised as ever."""
    batch = random_batch()
    log_prob = batch.new.log_prob.detach().clone().requires_grad_()
    floor = math.exp(log_prob.detach()[batch.corruption.scored].median())
    held = floored(Score(log_prob, batch.new.centred_logit), batch.advantage, floor).log_prob
    held.sum().backward()
    below = (log_prob.detach() < math.log(floor)) & (batch.advantage < 0)[:, None]
    assert below.any() and (~below & (log_prob < math.log(floor))).any()
    assert torch.equal(log_prob.grad == 0, below)
    assert torch.equal(held.detach()[~below], log_prob.detach()[~below])
    assert (held.detach()[below] == math.log(floor)).all()
    assert floored(batch.new, batch.advantage, 0.0) is batch.new


def test_the_entropy_term_is_the_entropys_gradient():
    """Without a reward, the expected gradient is that of the entropy of what is drawn, by enumeration of one draw."""
    logits = torch.tensor([0.3, -1.0, 1.2], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(dim=0)
    scored = torch.ones(1, 3, 1, dtype=torch.bool)
    batch = Batch(
        new=Score(log_p[None, :, None], torch.zeros(1, 3, 1)),
        old=None,
        reference=None,
        corruption=Corruption(scored, scored, scored.double(), scored[..., :0]),
        length=torch.ones(3),
        advantage=torch.zeros(3, dtype=torch.float64),
        weight=log_p.detach().exp(),
    )
    loss, _ = trace_pg_loss(batch, TracePGConfig(entropy_weight=0.7))
    (found,) = torch.autograd.grad(-loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), logits)
    torch.testing.assert_close(found, 0.7 * expected)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (SPGConfig(negative="zero"), "negative='zero'.*mixture, eubo, elbo.*negative_scale=0 leaves"),
        (SPGConfig(negative_scale=-0.1), r"negative_scale=-0\.1.*\[0, 1\]"),
        (WD1Config(negative_floor=1.0), r"negative_floor=1\.0.*\[0, 1\)"),
        (GDSDTLCConfig(negative_floor=0.1), r"negative_floor=0\.1: centred logits"),
        (SPGConfig(forwards=100), r"forwards=100: the first step of 256 completions"),
        (TracePGConfig(entropy_weight=-1.0), r"entropy_weight=-1\.0"),
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
