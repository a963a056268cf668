"""Independent Metropolis-Hastings: samples from p(completion | prompt)^alpha, without training (arXiv 2604.00375).

Of all ways to trade quality for exploration, the maximum of ``E_q[log p] + H(q) / alpha`` over distributions q of whole
completions is p^alpha / Z, tempered globally; token temperature and low-confidence remasking temper locally. A proposal
is a whole completion (or block), decoded without regard to the current one, and accepted with probability
``min(1, w' / w)``, ``w = p^alpha / q``:

- ``log q``: the log-probability with which each token was drawn at the step that wrote it, summed. The positions may be
  chosen in any way, at random too, that sees the canvas and the denoiser's probabilities, but not the tokens drawn for
  positions that stay masked: their order is then an auxiliary variable whose probability is the same under target and
  proposal and cancels. All samplers of this project are like that; with one of your own the result is `approximate`.
- ``log p``: by "trajectory", the untempered log-probabilities along the same order, where one token is written a step
  (exact for a consistent denoiser, whatever the order); or by "elbo", estimated with ``maskings`` maskings.

The target is a distribution over canvases: tokens after the end of the text are drawn like all others, and nothing is
filled in for free. With ``block_length`` below the canvas length chains run block by block, K proposals of a block
given the accepted earlier ones; the target is the product over blocks of p(block | earlier)^alpha / Z(earlier).
An "elbo" is noisy: it targets E[exp(alpha * estimate)], which nears p^alpha as maskings grow and alpha falls.

Metrics of a chain step, means over chains: ``acceptance`` and ``log_likelihood`` (of the current state, nats).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.agents.samplers.base import Sampler, as_sampler
from dllm_gym.agents.samplers.heuristics import HEURISTICS, make_policy
from dllm_gym.decoding import likelihood
from dllm_gym.decoding.corruption import Corruption, corrupt, corrupted_canvas
from dllm_gym.denoisers.session import DecodingSession
from dllm_gym.envs.episodes import Episodes, Finished
from dllm_gym.names import find
from dllm_gym.transfer import onto, read
from dllm_gym.types import Action, Canvas, Indices, Observation

LIKELIHOODS = ("trajectory", "elbo")


@dataclass
class Metropolis:
    """Independent Metropolis-Hastings chains; call `run`."""

    alpha: float = 2.0
    """Exponent of the target distribution, above 0; 1 is the denoiser's own distribution."""
    steps: int = 8
    """Number of proposals per chain after its first state, and per block if there are blocks."""
    proposal: str | Sampler | Callable[[Observation], Tensor] = "random"
    """Name of a heuristic, used with its defaults, or any sampler."""
    likelihood: str = "trajectory"
    """How a completion's likelihood is computed: "trajectory" or "elbo"."""
    maskings: int = 8
    """Number of maskings that the "elbo" averages over; must be even."""
    seed: int = 0
    """Random seed for tokens, positions, maskings and acceptance."""
    stepwise = False
    draws = True

    def __post_init__(self):
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: must be more than 0, and finite (1: the denoiser's distribution).")
        if self.steps < 1 or self.steps % 1:
            raise ValueError(f"steps={self.steps}: must be a whole number, 1 or more.")
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood={self.likelihood!r}: must be one of {', '.join(LIKELIHOODS)}.")
        if self.maskings < 2 or self.maskings % 2:
            raise ValueError(f"maskings={self.maskings}: must be 2 or more, and even (a mask and its complement).")
        if not (callable(self.proposal) or hasattr(self.proposal, "choose")):
            self.proposal = find(self.proposal, HEURISTICS, "proposal", ", or a sampler")

    @property
    def approximate(self) -> bool:
        """Whether the target is not quite p^alpha: a noisy "elbo", or a proposal whose likelihood may not be log q."""
        return self.likelihood == "elbo" or not self._proposal().ignores_tokens

    @property
    def confidence_k(self) -> int:
        """Number of probabilities per position that the proposal reads."""
        return self._proposal().confidence_k

    @property
    def signals(self) -> tuple[str, ...]:
        """What the proposal reads of an observation."""
        return self._proposal().signals

    def settings(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return own | {"approximate": self.approximate}

    def _proposal(self) -> Sampler:
        if isinstance(self.proposal, str):
            return make_policy(self.proposal)
        return as_sampler(self.proposal)

    def check(self, episodes: Episodes) -> None:
        """Refuse episodes that give no chain. Raises ValueError."""
        sampling = episodes.sampling
        if sampling.temperature <= 0:
            raise ValueError(
                f"temperature={sampling.temperature}: proposals at temperature 0 are all the same; give 1.0."
            )
        if sampling.leaves_out or sampling.end_token_penalty or sampling.end_tokens_last:
            raise ValueError(
                "top_p, top_k, end_token_penalty and end_tokens_last: Metropolis-Hastings needs proposals from the "
                "denoiser's own distribution; leave them out."
            )

    def run(self, episodes: Episodes, problems: Indices) -> Chains:
        """One chain for each problem index; chains of one problem are independent.

        Args:
            episodes: gives task, denoiser, block length, the temperature of the proposals (1, or what comes near
                p^alpha), and the number of rows decoded together. Its running episodes are left alone.
            problems: indices into the task, repeated for several samples.

        Raises:
            ValueError: temperature 0; a "trajectory" along which several tokens were written at once.
        """
        return Chains.cat([chains for _, chains in self._groups(episodes, problems)])

    def play(
        self, episodes: Episodes, problems: Indices, numbers: Indices | None = None
    ) -> Iterator[tuple[int, Finished]]:
        """As `run`: the index n of each chain and its last state as the end of an episode, in the order of the chains.

        ``info["chain"]`` has the ``acceptance`` of its steps and the ``log_likelihood`` after each.

        Args:
            numbers: of the chains, from which their draws follow; None: 0, 1, ... For one part of many chains.
        """
        for start, chains in self._groups(episodes, problems, numbers):
            texts = decoding.completions(chains.canvas, episodes.end_tokens)
            acceptance, log_likelihood = chains.acceptance.tolist(), chains.log_likelihood.tolist()
            for i, text in enumerate(texts):
                end = episodes.judge(
                    start + i,
                    episodes.task[problems[start + i]],
                    text,
                    nfe=int(chains.nfe[i]),
                    positions=int(chains.positions[i]),
                    log_likelihood=log_likelihood[i][-1],
                )
                end.info["chain"] = {"acceptance": acceptance[i], "log_likelihood": log_likelihood[i]}
                yield start + i, end

    def _groups(
        self, episodes: Episodes, problems: Indices, numbers: Indices | None = None
    ) -> Iterator[tuple[int, Chains]]:
        """As many chains at once as there are rows for, with the index of the first."""
        self.check(episodes)
        sampler = self._proposal()
        group = max(1, episodes.num_rows // (self.steps + 1))
        for start in range(0, len(problems), group):
            rng = np.random.default_rng([self.seed, start if numbers is None else numbers[start]])
            yield start, self._chains(episodes, sampler, list(problems[start : start + group]), rng)

    def _chains(self, episodes: Episodes, sampler: Sampler, problems: list[int], rng: np.random.Generator) -> Chains:
        """Several chains at once: all proposals of a block first, then accept or reject one after the other."""
        prompts = [episodes.encode_prompt(episodes.task[index]) for index in problems]
        canvas = decoding.blank(prompts, episodes.gen_length, episodes.denoiser.mask_token_id)
        device, count, tries = canvas.tokens.device, len(problems), self.steps + 1
        chains = Chains(
            canvas=canvas,
            acceptance=torch.zeros(count, self.steps, device=device),
            log_likelihood=torch.zeros(count, tries, dtype=torch.float64, device=device),
            nfe=torch.zeros(count, dtype=torch.int64, device=device),
            positions=torch.zeros(count, dtype=torch.int64, device=device),
        )
        block, _ = decoding.blocks(
            canvas.masked, episodes.block_length, episodes.denoiser.block_offset(canvas.prompt_length)
        )
        copies = torch.arange(count, device=device).repeat_interleave(tries)
        for n in range(int(block.max()) + 1):
            inside, start = (block == n)[copies], chains.canvas[copies]
            proposals = propose(episodes, start, sampler, inside, rng)
            nfe, positions = proposals.canvas.steps - start.steps, proposals.positions
            if self.likelihood == "elbo":
                log_p = self._elbo(episodes, proposals.canvas, inside, rng)
                nfe = nfe + self.maskings
                positions = positions + self.maskings * (start.prompt_length + episodes.gen_length)
            elif (nfe == inside.sum(dim=1)).all():
                log_p = proposals.log_p
            else:
                raise ValueError(
                    f"likelihood='trajectory' with proposal={self.proposal!r}: several tokens were written in one "
                    f"step, and their probability is not that of the completion; give likelihood='elbo'."
                )
            log_weight = (self.alpha * log_p - proposals.log_q).view(count, tries)
            if log_weight.isnan().any():
                raise FloatingPointError("the likelihoods of proposals are not numbers: no chain can accept or reject.")
            log_uniform = torch.as_tensor(np.log1p(-rng.random((count, self.steps))), device=device)
            states = accept(log_weight, log_uniform)
            share = (block == n).any(dim=1) / (block[:, -1] + 1)  # of this block among those of the chain
            chains.acceptance += (states[:, 1:] != states[:, :-1]) * share[:, None]
            chains.log_likelihood += log_p.view(count, tries).gather(1, states)
            chains.nfe += nfe.view(count, tries).sum(dim=1)
            chains.positions += positions.view(count, tries).sum(dim=1)
            chains.canvas = proposals.canvas[torch.arange(count, device=device) * tries + states[:, -1]]
        return chains

    @torch.no_grad()
    def _elbo(self, episodes: Episodes, canvas: Canvas, inside: Tensor, rng: np.random.Generator) -> Tensor:
        """``[N]`` float64: the ELBO of the block ``inside`` ``[N, L]`` bool, given what is before it; 0 without one."""
        generator = torch.Generator(canvas.tokens.device).manual_seed(int(rng.integers(2**63 - 1)))
        log_prob = torch.zeros((self.maskings, *inside.shape), device=inside.device)
        weight = torch.zeros_like(log_prob)
        has = inside.any(dim=1).nonzero()[:, 0]
        canvas, inside = canvas[has], inside[has]
        drawn = corrupt("coupled", inside, canvas.prompt_mask, self.maskings, generator)
        drawn.masked &= inside | canvas.masked  # earlier blocks stay
        weight[:, has] = drawn.weight
        for n in range(self.maskings):
            for rows in torch.arange(len(has), device=inside.device).split(episodes.num_rows):
                part, tokens = canvas[rows], canvas.tokens[rows]
                one = Corruption(*(field[n : n + 1, rows] for field in vars(drawn).values()))
                corrupted = corrupted_canvas(
                    part.prompt, part.prompt_mask, tokens, one, episodes.denoiser.mask_token_id
                )
                score = episodes.denoiser.score(corrupted, tokens, one.scored[0])
                log_prob[n, has[rows]] = score.log_prob.float()
        return likelihood.elbo(log_prob, weight).double().sum(dim=1)


@dataclass
class Chains:
    """C finished chains of K steps."""

    canvas: Canvas
    """C rows: the last states."""
    acceptance: Tensor
    """``[C, K]`` float32: whether a step moved; with several blocks, the share of blocks in which it did."""
    log_likelihood: Tensor
    """``[C, K + 1]`` float64, nats: log p of the state after each step; with several blocks, the sum over them."""
    nfe: Tensor
    """``[C]`` int64: number of denoiser forward passes for all proposals, including those of the "elbo"."""
    positions: Tensor
    """``[C]`` int64: number of token positions in these forward passes."""

    @staticmethod
    def cat(parts: list[Chains]) -> Chains:
        """One after the other; of the canvases the prompts are dropped, they differ in width."""
        names = ("acceptance", "log_likelihood", "nfe", "positions")
        fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        bare = [
            dataclasses.replace(p.canvas, prompt=p.canvas.prompt[:, :0], prompt_mask=p.canvas.prompt_mask[:, :0])
            for p in parts
        ]
        canvas = Canvas(*(torch.cat([getattr(part, f.name) for part in bare]) for f in dataclasses.fields(Canvas)))
        return Chains(canvas, **fields)


@dataclass
class Proposals:
    """N canvases with one more block."""

    canvas: Canvas
    log_p: Tensor
    """``[N]`` float64: untempered log-probabilities of the tokens, each at the step that wrote it, summed."""
    log_q: Tensor
    """``[N]`` float64: the same of the distributions that they were drawn from."""
    positions: Tensor
    """``[N]`` int64: token positions forwarded."""


def propose(
    episodes: Episodes, canvas: Canvas, sampler: Sampler, inside: Tensor, rng: np.random.Generator
) -> Proposals:
    """Decode what is masked in one block, tokens drawn at the episodes' temperature, nothing filled in.

    Args:
        episodes: gives the denoiser, the block length, the temperature, the cache, and how many rows are decoded
            together.
        canvas: N rows.
        inside: ``[N, L]`` bool, the block of each row, before which nothing is masked.
        rng: of the tokens and the sampler.
    """
    session = DecodingSession(episodes.denoiser, canvas, episodes.block_length, stop_at_eos=False, cache=episodes.cache)
    device, known = canvas.tokens.device, read(inside)
    log_p, log_q = torch.zeros(2, len(canvas), dtype=torch.float64, device=device)
    while len(rows := (session.outline.masked & known).any(dim=1).nonzero()[: episodes.num_rows, 0]):
        shape = (len(rows), canvas.tokens.shape[1])
        index, uniforms = onto(device, rows, torch.as_tensor(rng.random(shape, dtype=np.float32)))
        seen, prediction = session.observe(rows, episodes.confidence_k, episodes.sampling, uniforms)
        (drawn,) = onto(device, torch.as_tensor(rng.random((len(rows), shape[1] + 1), dtype=np.float32)))
        picks, _ = sampler.choose(seen, uniforms=drawn)
        written = decoding.with_best(picks > 0, seen) & seen.eligible
        log_p[index] += torch.where(written, prediction.probability.double().log(), 0.0).sum(dim=1)
        log_q[index] += torch.where(written, prediction.draw_log_prob.double(), 0.0).sum(dim=1)
        session.commit(seen, Action.unmasking(written), rows)
    return Proposals(session.canvas, log_p, log_q, session.positions.to(device))


def accept(log_weight: Tensor, log_uniform: Tensor) -> Tensor:
    """Run C chains over proposals already made: step k moves to proposal k if ``log u < log w_k - log w``.

    Args:
        log_weight: ``[C, K + 1]``, of the first state and of K proposals.
        log_uniform: ``[C, K]``, logs of uniform numbers.

    Returns:
        ``[C, K + 1]`` int64: the number of the proposal that is the state after each step.
    """
    state = torch.zeros(len(log_weight), 1, dtype=torch.int64, device=log_weight.device)
    states = [state]
    for k in range(1, log_weight.shape[1]):
        moves = log_uniform[:, k - 1 : k] < log_weight[:, k : k + 1] - log_weight.gather(1, state)
        state = torch.where(moves, k, state)
        states.append(state)
    return torch.cat(states, dim=1)
