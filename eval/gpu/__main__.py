"""``python -m dllm_gym.eval.gpu``: figures of one GPU at the size of LLaDA-8B; ``--tiny`` on a CPU; or ``--plan``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from dllm_gym.agents.trainers.configs import at_least_one
from dllm_gym.denoisers.pretrained import CACHES
from dllm_gym.eval.command import run
from dllm_gym.eval.gpu.plan import Setting, print_plan


@dataclass
class GPUConfig:
    """Measure decoding and training with random weights of LLaDA-8B's shape; or calculate the memory they need."""

    tiny: bool = False
    """Measure a tiny denoiser instead, on a CPU if there is no GPU."""
    seconds: float = 480.0
    """No part is begun after this time."""
    plan: str | None = None
    """Only calculate: "llada-8b", "dream-7b", a folder with config.json, or a hub id, whose config.json alone is
    read."""
    batch: int = 32
    """Plan: number of completions decoded together in a process."""
    prompt_length: int = 256
    """Plan: number of tokens per prompt."""
    gen_length: int = 256
    """Plan: number of tokens per completion."""
    microbatch: int = 2
    """Plan: number of completions per backward pass."""
    maskings: int = 2
    """Plan: number of maskings per completion."""
    lora_rank: int = 0
    """Plan: rank of the adapters; 0 trains all weights."""
    gradient_checkpointing: bool = False
    """Plan: recompute layers in the backward pass."""
    cache: str = "none"
    """Plan: keys and values kept while decoding."""
    dtype: str = "bfloat16"
    """Plan: "bfloat16" or "float32"."""
    reference: bool = False
    """Plan: the objective reads a reference, a frozen copy where there are no adapters."""
    gpus: int = 8
    """Plan: number of GPUs, beside one."""
    memory_gb: float = 80.0
    """Plan: memory of a GPU, in GB."""


def work(config: GPUConfig) -> None:
    """Plan or measure. Raises ValueError for a setting that cannot be, RuntimeError without a GPU."""
    if config.plan is None:
        from dllm_gym.eval.gpu.measure import measure

        measure(config.tiny, config.seconds)
        return
    at_least_one(config, "batch", "prompt_length", "gen_length", "microbatch", "maskings", "gpus")
    if config.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={config.dtype!r}: must be 'bfloat16' or 'float32'.")
    known = sorted({cache for caches in CACHES.values() for cache in caches})
    if config.cache not in known:
        raise ValueError(f"cache={config.cache!r}: must be one of {known}.")
    setting = Setting(
        rows=config.batch,
        prompt_length=config.prompt_length,
        gen_length=config.gen_length,
        microbatch=config.microbatch,
        maskings=config.maskings,
        rank=config.lora_rank,
        checkpointing=config.gradient_checkpointing,
        cache=config.cache,
        half=config.dtype == "bfloat16",
        reference=config.reference,
    )
    print_plan(config.plan, setting, config.gpus, config.memory_gb)


if __name__ == "__main__":
    sys.exit(run("dllm_gym.eval.gpu", GPUConfig, work, None))
