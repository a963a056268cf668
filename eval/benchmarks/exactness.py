"""Bounds and objectives against enumeration: ``python -m dllm_gym.eval.benchmarks.exactness``, as in docs/oracle.md.

On tabular denoisers of a world small enough to enumerate: how far the ELBO and the EUBO are from the log-likelihood of
random-order decoding, and how well the expected gradients of the trajectory's likelihood, of the ELBO policy gradient
and of SPG agree with the true policy gradient, for a denoiser that comes from a joint distribution and for ones that do
not; the same for training together with a policy that sees the denoiser's confidences; and how far Metropolis-Hastings
chains are from the tempered distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import tyro
from rich.table import Table
from torch import Tensor

from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.agents.terminal import console
from dllm_gym.denoisers.enumeration import (
    exact_elbo,
    exact_eubo,
    log_likelihood_of_orders,
    random_order_log_likelihood,
    tempered,
)
from dllm_gym.denoisers.oracle import OracleDenoiser, TabularDenoiser
from dllm_gym.eval.benchmarks.enumeration import blank, expected_reward, policy_gradient_surrogate, tiny_policy
from dllm_gym.types import Canvas


@dataclass
class Config:
    """Print the tables."""

    words: int = 4
    """Number of words in the vocabulary (V)."""
    length: int = 4
    """Number of positions (L)."""
    seeds: int = 5
    """Number of tabular denoisers that come from no joint distribution."""
    betas: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Rényi orders of the EUBO."""
    omega: float = 0.5
    """Share of the EUBO in SPG's mixture."""
    chains: int = 20_000
    """Number of Metropolis-Hastings chains."""
    steps: int = 15
    """Number of steps per chain."""


def policy_gradients(denoiser: TabularDenoiser, reward: Tensor, beta: float, omega: float) -> dict[str, Tensor]:
    """The true policy gradient and the expected gradients of surrogates, with respect to the table, by enumeration.

    Completions are sampled by random-order decoding, one position a step; the advantage is the reward minus its mean.
    ``reward`` ``[V**L]`` is that of `sequences()`.
    """
    x = denoiser.sequences()
    log_likelihood = random_order_log_likelihood(denoiser, x)
    probability = log_likelihood.detach().exp()
    advantage = reward - (probability * reward).sum()
    elbo, eubo = exact_elbo(denoiser, x), exact_eubo(denoiser, x, beta)
    mixture = omega * eubo + (1 - omega) * elbo
    surrogates = {
        "true": log_likelihood,
        "elbo-pg": elbo,
        "spg mixture": torch.where(advantage > 0, elbo, mixture),
        "spg eubo": torch.where(advantage > 0, elbo, eubo),
        "spg zero": torch.where(advantage > 0, elbo, 0.0),
    }
    expected = {name: (probability * advantage * value).sum() for name, value in surrogates.items()}
    orders = log_likelihood_of_orders(denoiser, x)  # of all trajectories, each order as likely as another
    each = orders.detach().exp() / orders.shape[-1]
    expected["trace-pg"] = (each * advantage[:, None] * orders).sum()
    table = denoiser.model.table
    return {name: torch.autograd.grad(value, table, retain_graph=True)[0].flatten() for name, value in expected.items()}


def main(config: Config) -> None:
    """Print the bounds, the cosines and the total variations."""
    torch.set_num_threads(1)  # tensors this small are slower with more
    oracle = OracleDenoiser.default()
    denoisers = {"from the joint": TabularDenoiser.from_oracle(oracle)}
    for seed in range(config.seeds):
        denoisers[f"random {seed}"] = TabularDenoiser.random(config.words, config.length, seed)

    bounds = Table(title="mean over samples of random-order decoding, nats")
    bounds.add_column("denoiser")
    for name in ("ELBO", "log p", *(f"EUBO {beta:g}" for beta in config.betas)):
        bounds.add_column(name, justify="right")
    cosines = Table(title=f"cosine with the true policy gradient (beta {config.betas[0]:g}, omega {config.omega:g})")
    cosines.add_column("denoiser")
    names = ("trace-pg", "elbo-pg", "spg mixture", "spg eubo", "spg zero")
    for name in names:
        cosines.add_column(name, justify="right")
    for label, denoiser in denoisers.items():
        x = denoiser.sequences()
        with torch.no_grad():
            log_likelihood = random_order_log_likelihood(denoiser, x)
            values = [exact_elbo(denoiser, x), log_likelihood, *(exact_eubo(denoiser, x, b) for b in config.betas)]
            means = [float((log_likelihood.exp() * value).sum()) for value in values]
        bounds.add_row(label, *(f"{mean:.4f}" for mean in means))
        generator = torch.Generator().manual_seed(0)
        reward = (torch.rand(len(x), generator=generator, dtype=torch.float64) < 0.2).double()
        gradients = policy_gradients(denoiser, reward, config.betas[0], config.omega)
        row = [torch.cosine_similarity(gradients[name], gradients["true"], dim=0).item() for name in names]
        cosines.add_row(label, *(f"{value:.4f}" for value in row))
    for table in (bounds, cosines, together(config.seeds), total_variations(config)):
        console().print(table)


def together(seeds: int) -> Table:
    """Cosines of expected gradients with the true one, with respect to a denoiser whose confidences a policy sees.

    By enumeration of all episodes; right completions are drawn at random, and steps cost. joint-trace differentiates
    the likelihood of positions and tokens, trace-pg with this policy as its sampler that of the tokens alone.
    """
    table = Table(title="cosine with the true policy gradient of a denoiser that a policy decodes")
    for name in ("policy", "denoiser"):
        table.add_column(name)
    for name in ("joint-trace", "trace-pg"):
        table.add_column(name, justify="right")
    words, length = 2, 3
    for distribution, seed in product(("bernoulli", "dpls"), range(seeds)):
        denoiser, policy = TabularDenoiser.random(words, length, seed), tiny_policy(distribution, seed)
        right = torch.rand((words,) * length, generator=torch.Generator().manual_seed(seed)) < 0.3

        def reward(canvas: Canvas, right: Tensor = right) -> float:
            return float(right[tuple(canvas.tokens[0])]) * (1 - int(canvas.steps[0]) / (2 * length))

        world = (denoiser, policy, reward, blank(denoiser))
        expected = [expected_reward(*world)]
        expected += [policy_gradient_surrogate(*world, positions=both) for both in (True, False)]
        true, *others = (torch.autograd.grad(value, denoiser.model.table)[0].flatten() for value in expected)
        cosines = [torch.cosine_similarity(gradient, true, dim=0).item() for gradient in others]
        table.add_row(distribution, f"random {seed}", *(f"{value:.4f}" for value in cosines))
    return table


def total_variations(config: Config) -> Table:
    """A row for each proposal: total variation of the chains' last states to p^alpha, and the share of moves."""
    table = Table(title=f"Metropolis-Hastings on the oracle, {config.chains} chains of {config.steps} steps")
    for name in ("proposal", "log p", "blocks of"):
        table.add_column(name)
    for alpha in ALPHAS:
        table.add_column(f"TV, alpha {alpha:g}", justify="right")
    table.add_column("moves", justify="right")
    cases = [("random", "trajectory"), ("left-to-right", "trajectory"), ("confidence", "trajectory")]
    cases += [("tempered-confidence", "trajectory"), ("random", "elbo"), ("threshold", "elbo")]
    for (proposal, likelihood), block_length in product(cases, (4, 2)):
        env = EnvConfig("MaskedDiffusion-Oracle-v0", num_envs=20_000, temperature=1.0, block_length=block_length)
        episodes = make_env(env, "test").unwrapped.episodes
        joint, distances, moves = episodes.denoiser.joint, [], []
        for alpha in ALPHAS:
            sampler = Metropolis(alpha, config.steps, proposal, likelihood)
            chains = sampler.run(episodes, [0] * config.chains)
            places = joint.shape[0] ** torch.arange(joint.ndim - 1, -1, -1)
            counts = torch.bincount((chains.canvas.tokens * places).sum(dim=1), minlength=joint.numel())
            exact = tempered(joint, alpha, block_length).flatten()
            distances.append(f"{0.5 * (counts / config.chains - exact).abs().sum():.3f}")
            moves.append(f"{chains.acceptance.mean():.2f}")
        table.add_row(proposal, likelihood, str(block_length), *distances, ", ".join(moves))
    return table


ALPHAS = (1.0, 2.0, 4.0)


if __name__ == "__main__":
    main(tyro.cli(Config))
