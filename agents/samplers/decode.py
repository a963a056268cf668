"""Decoding prompts with a denoiser and a sampler: no task, no reward, no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_gym.agents.samplers.base import Sampler, as_sampler
from dllm_gym.agents.samplers.rollout import play
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.envs.episodes import Episodes
from dllm_gym.envs.settings import EnvSettings
from dllm_gym.tasks.base import Task
from dllm_gym.types import Observation, Problem, Verdict


@dataclass
class Decoded:
    """N completions, in the order of their prompts."""

    texts: list[str]
    """``[N]``, up to the first end token."""
    tokens: Tensor
    """``[N, L]`` int64: the final canvases."""
    nfe: Tensor
    """``[N]`` int64: number of denoiser forward passes."""
    positions: Tensor
    """``[N]`` int64: number of token positions in these forward passes."""


def decode(
    denoiser: Denoiser,
    prompts: Sequence[str | Tensor],
    policy: str | Sampler | Callable[[Observation], Tensor] = "confidence",
    *,
    gen_length: int,
    block_length: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    end_token_penalty: float = 0.0,
    end_tokens_last: bool = False,
    confidence: str = "untempered",
    cache: str = "auto",
    stop_at_eos: bool = True,
    num_rows: int = 32,
    seed: int = 0,
) -> Decoded:
    """Complete any number of prompts. They are decoded together, longest first, and finished rows are refilled.

    Args:
        denoiser: from `dllm_gym.load_denoiser`, or one of your own.
        prompts: texts, which go through the tokenizer's chat template where it has one; or 1-D int64 tensors of tokens,
            taken as they are.
        policy: a sampler as text (``"threshold:threshold=0.9"``, or the folder of a trained policy), a `Sampler`, or a
            function ``Observation -> [B, L] bool``.
        gen_length: L, the number of tokens in a completion.
        block_length: blocks are decoded left to right; must divide L. None means the denoiser's own block if it has
            one, else L.
        temperature: sampling temperature; 0 takes the argmax.
        top_p, top_k, end_token_penalty, end_tokens_last, confidence: see `dllm_gym.types.TokenSampling`.
        cache: keys and values kept between forward passes: "none", "prompt", "prefix", "dual", or "auto", what is
            exact for the denoiser. See ``docs/caches.md``.
        stop_at_eos: fill the masked positions after the end of a text at no cost.
        num_rows: number of completions decoded together.
        seed: completion n draws its tokens from a generator seeded by (seed, n), whatever the number of rows.

    Raises:
        ValueError: no prompts, a prompt that does not fit into the denoiser's context, or an argument out of range.
    """
    prompts = list(prompts)
    if isinstance(policy, str):
        policy = make_stepwise(policy, seed, denoiser.device)
    if not getattr(policy, "stepwise", True):
        raise ValueError(f"policy={policy!r}: makes whole completions; give one that unmasks step by step.")
    policy = as_sampler(policy)
    settings = EnvSettings(
        denoiser=denoiser,
        gen_length=gen_length,
        block_length=block_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        end_token_penalty=end_token_penalty,
        end_tokens_last=end_tokens_last,
        confidence=confidence,
        cache=cache,
        stop_at_eos=stop_at_eos,
        confidence_k=policy.confidence_k,
    )
    episodes = Episodes(Prompts(prompts), max(1, min(num_rows, len(prompts))), settings)
    ended = sorted(play(episodes, policy, range(len(prompts)), seed=seed), key=lambda one: one.number)
    infos = [one.end.info for one in ended]
    return Decoded(
        texts=[info["completion"] for info in infos],
        tokens=torch.stack([one.tokens for one in ended]),
        nfe=torch.tensor([info["nfe"] for info in infos]),
        positions=torch.tensor([info["positions"] for info in infos]),
    )


class Prompts(Task):
    """Prompts without answers."""

    name, columns = "prompts", "nothing: there are no rows"

    def __init__(self, prompts: list[str | Tensor]):
        if not prompts:
            raise ValueError("prompts is empty: give at least one.")
        for i, prompt in enumerate(prompts):
            whole = isinstance(prompt, Tensor) and prompt.ndim == 1 and prompt.dtype == torch.int64
            if not (isinstance(prompt, str) or whole):
                raise ValueError(f"prompts[{i}]: must be a text or a 1-D int64 tensor, not {type(prompt).__name__}.")
        self.prompts, self.dataset, self.split = prompts, "prompts", "test"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Problem:
        prompt = self.prompts[index]
        text, tokens = ("", prompt) if isinstance(prompt, Tensor) else (prompt, None)
        return Problem(id=f"prompts[{index}]", prompt=text, answer=None, tokens=tokens)

    def read_row(self, row: dict) -> tuple[str, None]:
        raise ValueError("prompts have no rows")

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(correct=False, score=0.0, answer=None)
