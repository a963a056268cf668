"""What one GPU does at the size of LLaDA-8B: decoding, the denoiser's training, the sampler's training.

Every figure is a line of JSON, printed as soon as it is known, so that a run that is cut off leaves what it measured.
Weights are random and made on the device: nothing is downloaded.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import cast
from unittest.mock import patch

import gymnasium as gym
import torch

from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.samplers.decode import Prompts
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.samplers.policy import PolicyConfig
from dllm_gym.agents.trainers.policy import grpo
from dllm_gym.agents.trainers.policy.networks import make_policy_network
from dllm_gym.agents.trainers.processes import Processes
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.denoisers.session import DecodingSession
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.eval.benchmarks import trainer as trainer_benchmark
from dllm_gym.eval.benchmarks.random_llama import SPECIAL, ModelConfig, random_llama
from dllm_gym.eval.benchmarks.timing import now
from dllm_gym.eval.gpu.plan import Shape
from dllm_gym.types import Action

TENSOR_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, by a part of the card's name, as its maker states them."""


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    model: ModelConfig
    batches: tuple[int, ...]
    block_length: int
    tokens_per_step: tuple[int, ...]
    completions: int
    """Completions of a training step."""
    updates: int
    steps: int
    """Forward passes in which a completion of a training step is decoded."""
    microbatch: int
    problems: int
    group: int
    backend: str
    """Backend of torch.compile."""


LLADA_8B = Sizes(
    model=ModelConfig(size="llada-8b", prompt_length=256, gen_length=256),
    batches=(1, 8, 32),
    block_length=32,
    tokens_per_step=(1, 4),
    completions=12,
    updates=12,
    steps=128,
    microbatch=4,
    problems=16,
    group=8,
    backend="inductor",
)
TINY = Sizes(
    model=ModelConfig(
        vocab_size=256, hidden_size=32, mlp_size=64, layers=2, heads=2, prompt_length=16, gen_length=16, lora_rank=4
    ),
    batches=(1, 2),
    block_length=4,
    tokens_per_step=(1, 2),
    completions=4,
    updates=2,
    steps=4,
    microbatch=2,
    problems=2,
    group=2,
    backend="eager",
)


def measure(tiny: bool, seconds: float) -> None:
    """Print everything that there is time for: a part is not begun after so many seconds."""
    sizes = TINY if tiny else LLADA_8B
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        raise RuntimeError("there is no CUDA device: --tiny runs on a CPU, --plan calculates.")
    began = time.perf_counter()
    say(
        "machine",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
        **({"memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9} if device.type == "cuda" else {}),
    )
    for part in (decoding, training, policy_training):
        for line in part(sizes, device):
            say(part.__name__, **line)
            if time.perf_counter() - began > seconds:
                say("stopped", after_seconds=time.perf_counter() - began)
                return
        release(device)
    say("done", seconds=time.perf_counter() - began)


def say(what: str, **figures) -> None:
    """One line of JSON, numbers to four digits."""
    rounded = {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in figures.items()}
    print(json.dumps({"what": what} | rounded), flush=True)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more, and begin to count memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """Most memory since the last `release`, in GB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def timed(function: Callable, name: str, spent: dict[str, float], device: torch.device) -> Callable:
    """The same function, which adds its seconds to ``spent[name]``."""

    def run(*args, **kwargs):
        start = now(device)
        result = function(*args, **kwargs)
        spent[name] += now(device) - start
        return result

    return run


def random_prompts(model: ModelConfig, count: int, device: torch.device) -> list:
    """``count`` 1-D int64 tensors."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, model.prompt_length)
    return [*torch.randint(len(SPECIAL), model.vocab_size, shape, generator=generator).to(device)]


# Decoding


def decoding(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """One block of every batch, cache and number of tokens a step; the other blocks take as long. Then compiled."""
    model = sizes.model.resolved()
    denoiser = random_llama(model, device)
    weights = torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    for compiled in (False, True):
        if compiled:
            denoiser.compile(sizes.backend)
        for batch, k, cache in product(sizes.batches, sizes.tokens_per_step, ("none", "prefix", "dual")):
            if not compiled or (k == sizes.tokens_per_step[0] and cache != "prefix"):
                prompts = random_prompts(model, batch, device)
                release(device)
                decode_block(denoiser, prompts, sizes, k, cache)  # warm
                seconds, forwards, _ = decode_block(denoiser, prompts, sizes, k, cache)
                slow, _, inside = decode_block(denoiser, prompts, sizes, k, cache, watched=True)
                peak = peak_gb(device)
                yield {
                    "batch": batch,
                    "tokens_per_step": k,
                    "cache": cache,
                    "compiled": compiled,
                    "tokens_per_second": batch * sizes.block_length / seconds,
                    "forwards_per_second": forwards / seconds,
                    "outside_the_denoiser": 1 - inside / slow,
                    "model_flops_utilisation": utilisation(denoiser, model, batch, forwards / seconds)
                    if cache == "none"
                    else None,
                    "peak_gb_over_weights": None if peak is None else peak - weights,
                }


def decode_block(
    denoiser: PretrainedDenoiser, prompts: list, sizes: Sizes, k: int, cache: str, watched: bool = False
) -> tuple[float, int, float]:
    """Seconds, forward passes, and, where watched, the seconds inside the denoiser."""
    length = sizes.model.resolved().gen_length
    session = DecodingSession.blank(denoiser, prompts, length, sizes.block_length, stop_at_eos=False, cache=cache)
    sampler = make_policy("confidence", k=k)
    spent = {"denoiser": 0.0}
    predict = timed(denoiser.predict, "denoiser", spent, denoiser.device) if watched else denoiser.predict
    steps = -(-sizes.block_length // k)
    with patch.object(denoiser, "predict", predict):
        start = now(denoiser.device)
        for _ in range(steps):
            seen, _ = session.observe(check=False)
            picks, _ = sampler.choose(seen)
            session.commit(seen, Action.unmasking(picks > 0))
        return now(denoiser.device) - start, steps, spent["denoiser"]


def utilisation(denoiser: PretrainedDenoiser, model: ModelConfig, batch: int, per_second: float) -> float | None:
    """Operations of whole forward passes a second over what the card can do; None for a card that is not known."""
    name = torch.cuda.get_device_name(denoiser.device) if denoiser.device.type == "cuda" else ""
    best = next((flops for part, flops in TENSOR_FLOPS.items() if part in name), None)
    if best is None:
        return None
    shape = Shape.of(denoiser.causal_lm.config)
    length = model.prompt_length + model.gen_length
    matrices = 2 * shape.layers * sum(rows * columns for rows, columns in shape.matrices)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * length
    return batch * length * (matrices + attention) * per_second / best


# Training


def training(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """One step of each objective: sampling, and the updates."""
    model = replace(
        sizes.model.resolved(),
        size="flags",
        batch=sizes.completions,
        microbatch=sizes.microbatch,
        steps=sizes.steps,
        inner_iterations=sizes.updates,
    )
    env = EnvConfig("MaskedDiffusion-Sudoku-v0", device="cpu" if device.type == "cpu" else "cuda", temperature=1.0)
    for objective in ("spg", "gdsd", "coupled-grpo"):
        contestant = trainer_benchmark.on_llama(objective, env, model)
        release(device)
        with trainer_benchmark.timed(contestant.learner) as spent:
            start = now(device)
            contestant.run()
            seconds = now(device) - start
        phases = {f"{phase.replace(' ', '_')}_seconds": value for phase, value in sorted(spent.items())}
        yield {
            "objective": objective,
            "completions": sizes.completions,
            "updates": sizes.updates,
            "steps": sizes.steps,
            "seconds": seconds,
            **phases,
            "peak_gb": peak_gb(device),
        }
        del contestant
        release(device)


def policy_training(sizes: Sizes, device: torch.device) -> Iterator[dict]:
    """One iteration of GRPO for the sampler, with keys and values kept ("dual"); the second one is measured."""
    model = sizes.model.resolved()
    denoiser = random_llama(model, device)
    env = gym.make_vec(
        "MaskedDiffusion-GSM8K-v0",
        num_envs=sizes.problems * sizes.group,
        task=Prompts(random_prompts(model, 4 * sizes.problems, device)),
        denoiser=denoiser,
        gen_length=model.gen_length,
        block_length=sizes.block_length,
        cache="dual",
    )
    config = grpo.GRPOConfig(problems=sizes.problems, group=sizes.group, experts=(), policy=PolicyConfig())
    policy = make_policy_network(config.policy, 0, device)
    optimizer = grpo.make_optimizer(policy, config)
    spent = {"denoiser": 0.0, "policy": 0.0, "update": 0.0}
    with (
        patch.object(denoiser, "predict", timed(denoiser.predict, "denoiser", spent, device)),
        patch.object(policy, "act", timed(policy.act, "policy", spent, device)),
        patch.object(grpo, "update", timed(grpo.update, "update", spent, device)),
    ):
        for iteration in range(2):
            spent.update(dict.fromkeys(spent, 0.0))
            start = now(device)
            metrics, _ = grpo.improve(
                [cast(UnmaskingVectorEnv, env.unwrapped)],
                policy,
                optimizer,
                config,
                iteration,
                Processes(device=device),
            )
            seconds = now(device) - start
    shares = {f"{name}_share": value / seconds for name, value in spent.items()}
    yield {
        "problems": sizes.problems,
        "group": sizes.group,
        "seconds": seconds,
        "forwards_per_completion": metrics["nfe"],
        **shares,
        "environment_share": 1 - sum(shares.values()),
        "peak_gb": peak_gb(device),
    }
