"""Independent Metropolis-Hastings, against p^alpha on the oracle's joint distribution, where it can be enumerated."""

import pytest
import torch
from scripted import ScriptedDenoiser

from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers import metropolis
from dllm_gym.agents.samplers.base import as_sampler
from dllm_gym.agents.samplers.metropolis import Metropolis, accept
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.samplers.spec import make_sampler
from dllm_gym.denoisers.enumeration import tempered
from dllm_gym.denoisers.oracle import OracleDenoiser
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.types import Observation

CHAINS = 4000
"""Three times as many for alpha 1, whose target is less concentrated."""
CLOSE = 0.03
"""Total variation between the chains and the target; up to 0.02 of it is due to their number."""


def episodes(temperature: float = 1.0, block_length: int | None = None, rows: int = 50_000):
    config = EnvConfig(
        id="MaskedDiffusion-Oracle-v0", num_envs=rows, temperature=temperature, block_length=block_length
    )
    return make_env(config, "test").unwrapped.episodes


def target(joint: torch.Tensor, alpha: float, block_length: int) -> torch.Tensor:
    """The product over blocks of p(block | earlier)^alpha / Z(earlier), ``[V**L]``; one block: p^alpha / Z."""
    whole = torch.ones_like(joint)
    for begin in range(0, joint.ndim, block_length):
        inside, after = tuple(range(begin, begin + block_length)), tuple(range(begin + block_length, joint.ndim))
        upto = joint.sum(dim=after, keepdim=True) if after else joint
        tempered = (upto / upto.sum(dim=inside, keepdim=True)) ** alpha
        whole = whole * tempered / tempered.sum(dim=inside, keepdim=True)
    return whole.flatten()


def total_variation(
    sampler: Metropolis, alpha: float, block_length: int = 4, temperature: float = 1.0, chains: int | None = None
) -> float:
    """Between the last states of many chains and the target with ``alpha``."""
    made = episodes(temperature, block_length)
    chains = chains or CHAINS * (3 if alpha == 1 else 1)
    tokens = sampler.run(made, [0] * chains).canvas.tokens
    joint = made.denoiser.joint
    places = joint.shape[0] ** torch.arange(joint.ndim - 1, -1, -1)
    counts = torch.bincount((tokens * places).sum(dim=1), minlength=joint.numel())
    return float(0.5 * (counts / chains - target(joint, alpha, block_length)).abs().sum())


@pytest.mark.parametrize("block_length", [4, 2])
@pytest.mark.parametrize("alpha", [1, 2, 4])
@pytest.mark.parametrize("proposal", ["random", "left-to-right"])
def test_the_chain_converges_to_the_tempered_distribution(alpha, block_length, proposal):
    sampler = Metropolis(alpha=alpha, steps=12, proposal=proposal)
    assert total_variation(sampler, alpha, block_length) < CLOSE
    assert not sampler.approximate


@pytest.mark.parametrize("proposal", ["confidence", "margin", "entropy", "tempered-confidence"])
def test_orders_that_follow_the_denoiser_are_exact_too(proposal):
    """They see the canvas, not the tokens that are drawn: the order cancels between target and proposal."""
    config = EnvConfig(id="MaskedDiffusion-Oracle-v0", num_envs=50_000, temperature=1.0, confidence_k=2)
    made = make_env(config, "test").unwrapped.episodes
    tokens = Metropolis(alpha=2, steps=12, proposal=proposal).run(made, [0] * CHAINS).canvas.tokens
    places = 4 ** torch.arange(3, -1, -1)
    counts = torch.bincount((tokens * places).sum(dim=1), minlength=256)
    assert 0.5 * (counts / CHAINS - target(made.denoiser.joint, 2, 4)).abs().sum() < CLOSE


def test_proposals_at_another_temperature_are_corrected_for():
    assert total_variation(Metropolis(alpha=2, steps=12), 2, temperature=0.7) < CLOSE


def test_an_elbo_in_place_of_the_trajectory():
    assert total_variation(Metropolis(alpha=1, steps=8, likelihood="elbo", maskings=32), 1, chains=6000) < 0.06
    several = Metropolis(alpha=1, steps=8, likelihood="elbo", maskings=32, proposal=make_sampler("random:k=2"))
    assert total_variation(several, 1, chains=6000) < 0.06


@pytest.mark.parametrize(
    "wrong",
    [
        lambda log_weight, log_uniform: accept(torch.zeros_like(log_weight), log_uniform),  # all are accepted
        lambda log_weight, log_uniform: accept(-log_weight, log_uniform),
        lambda log_weight, log_uniform: accept(log_weight / 3 * 4, log_uniform),  # w = p^4 instead of p^4 / q
        lambda log_weight, log_uniform: log_weight.cummax(dim=1).indices,  # the best so far
    ],
)
def test_a_wrong_acceptance_rule_does_not_pass(monkeypatch, wrong):
    monkeypatch.setattr(metropolis, "accept", wrong)
    assert total_variation(Metropolis(alpha=4, steps=12), 4) > CLOSE


def test_acceptance_by_hand():
    log_weight = torch.tensor([[0.0, -1.0, 2.0, 1.5], [1.0, 1.0, 0.0, 3.0]])
    log_uniform = torch.tensor([[-0.5, -9.0, -0.4], [-0.1, -0.9, -0.1]])
    assert accept(log_weight, log_uniform).tolist() == [[0, 0, 2, 2], [0, 1, 1, 3]]
    assert accept(log_weight, log_uniform - 0.2).tolist() == [[0, 0, 2, 3], [0, 1, 2, 3]]


def test_a_chain_reports_what_it_did():
    made = episodes(block_length=2, rows=64)
    sampler = Metropolis(alpha=3, steps=5)
    chains, ended = sampler.run(made, [7, 7, 3] * 5), dict(sampler.play(made, [7, 7, 3] * 5))
    assert chains.acceptance.shape == (15, 5) and chains.log_likelihood.shape == (15, 6)
    assert ((chains.acceptance * 2) % 1 == 0).all() and 0 < chains.acceptance.mean() < 1
    assert chains.nfe.tolist() == [6 * 4] * 15  # six proposals of two blocks of two steps
    assert sorted(ended) == list(range(15))
    infos = [ended[n].info for n in range(15)]
    assert [info["problem_id"] for info in infos] == [made.task[i].id for i in [7, 7, 3] * 5]
    assert [info["log_likelihood"] for info in infos] == chains.log_likelihood[:, -1].tolist()
    assert all(info["nfe"] == 24 for info in infos)
    assert [info["chain"]["acceptance"] for info in infos] == chains.acceptance.tolist()
    # The trace is log p of the state: the joint's own, here, whatever the order.
    joint = made.denoiser.joint
    exact = [float(joint[tuple(tokens)].log()) for tokens in chains.canvas.tokens]
    assert chains.log_likelihood[:, -1].tolist() == pytest.approx(exact, abs=1e-3)


def test_quality_rises_along_the_chain():
    chains = Metropolis(alpha=4, steps=12).run(episodes(), [0] * CHAINS)
    assert chains.log_likelihood[:, -1].mean() > chains.log_likelihood[:, 0].mean() + 0.3


def test_the_same_seed_gives_the_same_chains():
    runs = [Metropolis(alpha=2, steps=4, seed=seed).run(episodes(rows=20), [0, 1, 2, 3]) for seed in (5, 5, 6)]
    tokens = [run.canvas.tokens.tolist() for run in runs]
    assert tokens[0] == tokens[1] != tokens[2]
    assert torch.equal(runs[0].log_likelihood, runs[1].log_likelihood)


def test_more_proposals_than_rows_are_decoded_all_the_same():
    chains = Metropolis(alpha=2, steps=9).run(episodes(rows=3), [0, 1])
    assert chains.nfe.tolist() == [40, 40] and not chains.canvas.masked.any()


def test_tokens_after_the_end_are_drawn_and_not_filled_in(task):
    """The end token at position 0 does not end the decoding: the target is over whole canvases."""
    denoiser = ScriptedDenoiser([[0.0, 0.0, 0.0, 0.0, 1.0], *[[0.5, 0.5, 0.0, 0.0, 0.0]] * 3])
    env = UnmaskingVectorEnv(task, 8, denoiser=denoiser, temperature=1.0)
    sampler = Metropolis(alpha=1, steps=3)
    chains, ended = sampler.run(env.episodes, [0, 1]), dict(sampler.play(env.episodes, [0, 1]))
    assert chains.nfe.tolist() == [16, 16] and ended[0].info["completion"] == "" and ended[0].info["length"] == 1
    assert chains.log_likelihood[:, -1].tolist() == pytest.approx([3 * torch.tensor(0.5).log().item()] * 2)


def test_samplers_of_ones_own_are_labelled():
    def by_token(observation: Observation) -> torch.Tensor:
        return (observation.token == 0) & observation.eligible

    assert Metropolis(proposal=by_token).approximate
    assert not Metropolis(proposal=UnmaskingPolicy(PolicyConfig(hidden_dim=16, mlp_dim=16))).approximate


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"steps": 0}, "steps=0"),
        ({"likelihood": "exact"}, "likelihood='exact': must be one of trajectory, elbo"),
        ({"maskings": 3}, "maskings=3"),
        ({"proposal": "thresold"}, "proposal='thresold': must be one of"),
    ],
)
def test_mistakes(arguments, named):
    with pytest.raises(ValueError, match=named):
        Metropolis(**arguments)


def test_forwards_of_the_elbo_count():
    chains = Metropolis(steps=2, likelihood="elbo", maskings=6).run(episodes(block_length=2, rows=20), [0])
    assert chains.nfe.tolist() == [3 * (4 + 2 * 6)]  # three proposals of two blocks of two steps, six maskings each


def test_proposals_that_cannot_be():
    with pytest.raises(ValueError, match=r"temperature=0\.0: proposals at temperature 0"):
        Metropolis().run(episodes(temperature=0.0), [0])
    with pytest.raises(ValueError, match=r"likelihood='trajectory' with .* give likelihood='elbo'"):
        Metropolis(proposal=make_sampler("random:k=2")).run(episodes(rows=20), [0])


def test_the_oracle_is_what_the_target_is_made_of():
    denoiser = OracleDenoiser.default()
    for alpha, block_length in ((3, 4), (2, 2), (0.5, 1)):
        expected = target(denoiser.joint, alpha, block_length)
        assert tempered(denoiser.joint, alpha, block_length).flatten() == pytest.approx(expected, abs=1e-12)
    assert target(denoiser.joint, 1, 4) == pytest.approx(denoiser.probabilities(), abs=1e-12)
    assert target(denoiser.joint, 1, 2) == pytest.approx(denoiser.probabilities(), abs=1e-12)


def test_a_proposal_needs_only_what_a_sampler_has():
    """It may be no function; one whose choice may depend on the tokens makes the target approximate."""
    proposal = as_sampler(lambda observation: observation.eligible)
    sampler = Metropolis(alpha=1, steps=2, likelihood="elbo", maskings=2, proposal=proposal)
    assert not callable(proposal) and sampler.approximate
    assert sampler.run(episodes(rows=6), [0, 1]).canvas.masked.sum() == 0
