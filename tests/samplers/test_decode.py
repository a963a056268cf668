"""`decode`: the loop of the environments, without a task."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from errors import error_of
from scripted import A, B, ScriptedDenoiser

from dllm_gym import load_denoiser
from dllm_gym.agents import decode, make_policy
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.agents.samplers.rollout import collect


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser("embedded-early")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_writes_what_the_environment_writes(denoiser, temperature):
    settings = {"denoiser": denoiser, "temperature": temperature}
    env = gym.make_vec("MaskedDiffusion-GSM8K-v0", num_envs=4, **settings)
    sampler = make_policy("threshold", threshold=0.7)
    rollout = collect(env, sampler, range(9), seed=3, explore=False)
    prompts = [problem.prompt for problem in rollout.problems]
    length = env.unwrapped.episodes.gen_length
    decoded = decode(denoiser, prompts, sampler, gen_length=length, temperature=temperature, num_rows=2, seed=3)
    assert decoded.texts == rollout.completions
    assert torch.equal(decoded.tokens, rollout.tokens) and torch.equal(decoded.nfe, rollout.nfe)
    ids = [denoiser.tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]
    as_tokens = decode(
        denoiser, ids, "threshold:threshold=0.7", gen_length=length, temperature=temperature, num_rows=32, seed=3
    )
    assert torch.equal(as_tokens.tokens, decoded.tokens) and torch.equal(as_tokens.positions, decoded.positions)


def test_positions_count_what_is_forwarded():
    scripted = ScriptedDenoiser([[0, 1.0]] * 4)
    prompts = [torch.tensor([A] * n) for n in (3, 1, 2)]
    decoded = decode(scripted, prompts, lambda seen: seen.eligible, gen_length=4, block_length=2)
    assert decoded.texts == ["b b b b"] * 3 and decoded.tokens.tolist() == [[B] * 4] * 3
    assert decoded.nfe.tolist() == [2] * 3 and decoded.positions.tolist() == [2 * (n + 4) for n in (3, 1, 2)]


@pytest.mark.parametrize(
    "prompts, changes, wanted",
    [
        ([], {}, "prompts is empty"),
        (["a", 3], {}, r"prompts\[1\]: must be a text or a 1-D int64 tensor, not int"),
        ([torch.zeros(1, 2, dtype=torch.int64)], {}, r"prompts\[0\]: must be a text or a 1-D int64"),
        (["a"], {"block_length": 3}, "block_length=3: must divide gen_length=4"),
        (["a"], {"cache": "dual"}, "cache='dual': denoiser can be decoded with 'auto', 'none'"),
        (["a"], {"policy": "threshhold"}, "threshhold"),
        (["a"], {"policy": "metropolis"}, "proposes whole completions"),
        (["a"], {"policy": Metropolis()}, "makes whole completions"),
        (["a " * 70], {}, r"'prompts\[0\]': 70 prompt tokens and gen_length=4 exceed"),
    ],
)
def test_mistakes(prompts, changes, wanted):
    scripted = ScriptedDenoiser(np.full((4, 4), 0.25))
    with pytest.raises(ValueError, match=wanted):
        decode(scripted, prompts, **{"policy": "confidence", "gen_length": 4} | changes)


def test_tokens_beyond_the_vocabulary(denoiser):
    message = error_of(ValueError, decode, denoiser, [torch.tensor([5, 900])], gen_length=4)
    assert "'prompts[0]': its token 900 is beyond the 187 tokens of" in message
