"""What caches gain: the same prompts decoded with and without them, by a denoiser with random weights."""

from __future__ import annotations

import numpy as np
import torch

from dllm_gym.agents.samplers.decode import Decoded, decode
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.terminal import console
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.eval.benchmarks.random_llama import ModelConfig, random_llama
from dllm_gym.eval.benchmarks.timing import median, now

PATTERNS = {"bidirectional": ("none", "prefix", "dual"), "block-causal": ("none", "prefix")}


def measure_caches(model: ModelConfig, block_length: int, repeats: int, device: torch.device) -> None:
    """Decode ``model.batch`` prompts of half to three halves of ``model.prompt_length`` tokens, one token per step."""
    from rich.table import Table

    model = model.resolved()
    generator = torch.Generator().manual_seed(0)
    lengths = np.linspace(model.prompt_length // 2, 3 * model.prompt_length // 2, model.batch).round().astype(int)
    prompts = [torch.randint(5, model.vocab_size, (n,), generator=generator) for n in lengths.tolist()]
    denoisers = {
        pattern: random_llama(model, device, pattern, block_length if pattern == "block-causal" else None)
        for pattern in PATTERNS
    }
    contestants = [(pattern, cache) for pattern, caches in PATTERNS.items() for cache in caches]
    seconds: dict[tuple, list[float]] = {contestant: [] for contestant in contestants}
    shares: dict[tuple, list[float]] = {contestant: [] for contestant in contestants}
    results: dict[tuple, Decoded] = {}
    for repeat in range(repeats + 1):
        for contestant in contestants[:: 1 if repeat % 2 else -1]:
            pattern, cache = contestant
            spent = _timed(denoisers[pattern])
            start = now(device)
            results[contestant] = decode(
                denoisers[pattern],
                prompts,
                make_policy("confidence"),
                gen_length=model.gen_length,
                block_length=block_length,
                cache=cache,
                stop_at_eos=False,
            )
            seconds[contestant].append(now(device) - start)
            shares[contestant].append(100 * spent[0] / seconds[contestant][-1])
            del denoisers[pattern].predict
    parameters = sum(p.numel() for p in denoisers["bidirectional"].model.parameters())
    table = Table(
        title=f"random denoiser of {parameters / 1e6:.1f} M weights, vocabulary {model.vocab_size}, {model.batch} "
        f"prompts of {lengths[0]} to {lengths[-1]} tokens, L {model.gen_length}, blocks of {block_length}, "
        f"one token per step, "
        f"{device}, {model.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, {repeats} repeats",
        caption="median of the repeats, minimum and maximum in brackets",
    )
    for name in ("attention", "cache", "tokens/s", "to none", "in the denoiser", "positions", "tokens as without"):
        table.add_column(name)
    tokens = model.batch * model.gen_length
    for contestant in contestants:
        pattern, cache = contestant
        times, plain = (np.array(seconds[(pattern, name)][1:]) for name in (cache, "none"))
        same = results[contestant].tokens == results[pattern, "none"].tokens
        table.add_row(
            pattern,
            cache,
            f"{tokens / np.median(times):.1f}",
            median(plain / times, ".2f", "x"),
            median(np.array(shares[contestant][1:]), ".1f", " %"),
            f"{results[contestant].positions.float().mean():.0f}",
            f"{100 * same.float().mean():.1f} %",
        )
    console().print(table)


def _timed(denoiser: PretrainedDenoiser) -> list[float]:
    """A list whose one entry is the seconds spent in `predict` since; until ``del denoiser.predict``."""
    predict, spent = denoiser.predict, [0.0]

    def timed(*args, **kwargs):
        start = now(denoiser.device)
        prediction = predict(*args, **kwargs)
        spent[0] += now(denoiser.device) - start
        return prediction

    denoiser.predict = timed  # type: ignore[method-assign]
    return spent
