"""A Llama with random weights and of any shape, and plain ways to decode and score with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.trainers.configs import at_least_one
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.denoisers.loading import DTYPES
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.denoisers.session import DecodingSession
from dllm_gym.types import Action, Canvas, Score, TokenSampling

SPECIAL = {"mask_token": "<mask>", "eos_token": "<eos>", "pad_token": "<pad>"}

SIZES = {
    "flags": {},
    "llada-17m": {"vocab_size": 8192, "hidden_size": 384, "mlp_size": 1024, "layers": 6, "heads": 6, "gen_length": 128},
    "llada-8b": {
        "vocab_size": 126464,
        "hidden_size": 4096,
        "mlp_size": 12288,
        "layers": 32,
        "heads": 32,
        "lora_rank": 128,
        "dtype": "bfloat16",
    },
}


@dataclass
class ModelConfig:
    """A Llama with random weights, and its iteration: random prompts are completed, random completions trained on."""

    size: str = "flags"
    """"flags": the fields below; "llada-17m"; "llada-8b": the shape of LLaDA-8B, bfloat16, adapters of rank 128."""
    vocab_size: int = 32768
    """Number of tokens in the vocabulary."""
    hidden_size: int = 256
    """Width of the network."""
    mlp_size: int = 768
    """Width of the MLP."""
    layers: int = 2
    """Number of transformer blocks."""
    heads: int = 4
    """Number of attention heads."""
    prompt_length: int = 64
    """Number of tokens per prompt."""
    gen_length: int = 256
    """Number of tokens per completion (L)."""
    batch: int = 8
    """Number of completions per iteration (B)."""
    microbatch: int = 8
    """Number of completions per forward and backward pass."""
    steps: int = 8
    """Number of forward passes in which a completion is decoded."""
    inner_iterations: int = 1
    """Number of updates per iteration."""
    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights instead."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass."""
    dtype: str = "float32"
    """Dtype of the weights."""

    def resolved(self) -> ModelConfig:
        """With the fields of its size. Raises ValueError for an unknown size or dtype, or a number below 1."""
        if self.size not in SIZES:
            raise ValueError(f"model.size={self.size!r}: must be one of {', '.join(SIZES)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}.")
        counts = "hidden_size mlp_size layers heads prompt_length gen_length batch microbatch steps inner_iterations"
        at_least_one(self, *counts.split())
        return replace(self, **SIZES[self.size])


def random_llama(
    model: ModelConfig, device: torch.device, attention_pattern: str = "bidirectional", block_size: int | None = None
) -> PretrainedDenoiser:
    """A Llama with random weights and no causal mask, and a tokenizer that knows only the special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL.values())}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=2 * model.prompt_length + model.gen_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        is_causal=False,
        attention_pattern=attention_pattern,
        block_size=block_size,
    )
    with seeded(0), device:
        return PretrainedDenoiser(AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype]), tokenizer)


def decode(denoiser: Denoiser, prompts: list[Tensor], length: int, steps: int) -> Tensor:
    """Complete prompts at temperature 1, the most confident positions first. Returns tokens ``[B, length]``."""
    session = DecodingSession.blank(denoiser, prompts, length, length, stop_at_eos=False)
    policy = make_policy("confidence", k=math.ceil(length / steps))
    while session.canvas.masked.any():
        uniforms = torch.rand(session.canvas.tokens.shape, device=denoiser.device)
        observation, _ = session.observe(sampling=TokenSampling(1.0), uniforms=uniforms)
        session.commit(observation, Action.unmasking(policy(observation)))
    return session.canvas.tokens


def plain_score(denoiser: Denoiser, canvas: Canvas, targets: Tensor, scored: Tensor, temperature: float) -> Score:
    """What `Denoiser.score` returns, as it is usually written: logits of every position of the completion, in float32.

    See `Denoiser.score` for arguments.
    """
    features = denoiser.features(canvas, torch.ones_like(canvas.masked))
    logits = denoiser.head(features).view(*targets.shape, -1).float().div_(temperature)
    mean = (logits.sum(dim=-1) - logits[..., denoiser.mask_token_id]) / (logits.shape[-1] - 1)
    logits[..., denoiser.mask_token_id] = -torch.inf
    target = logits.gather(-1, targets[..., None])[..., 0]
    log_prob = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
    return Score(log_prob.where(scored, 0.0), (target - mean).where(scored, 0.0))
