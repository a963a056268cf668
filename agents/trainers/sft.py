"""Masked-diffusion supervised training from scratch: it made the embedded denoiser.

LLaDA's loss (arXiv 2502.09992, section 2.2) in its low-variance form: the prompt stays clean, the NUMBER of masked
completion tokens is uniform on 1..L, and the loss is the mean cross-entropy of the masked tokens. Completions are
padded with the end token, which is learned like any other. Blocks are optimised with Muon, the rest with AdamW.

Metrics: ``loss/<task>`` mean cross-entropy of masked tokens in nats; ``learning_rate`` of Muon;
``examples_per_second`` over all processes.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from dllm_gym.agents.trainers.configs import at_least_one
from dllm_gym.agents.trainers.muon import linear_and_rest, muon
from dllm_gym.agents.trainers.processes import Processes, own_threads
from dllm_gym.agents.trainers.run import Run
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.denoisers.attention import AttentionPattern, additive, count_positions
from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.files import written
from dllm_gym.tasks import make_task
from dllm_gym.tasks.base import GeneratedTask

LARGEST_INTEGER = 99
"""Every integer from 0 to this is one token: digits as characters never learnt to calculate at this size."""


@dataclass
class SFTConfig:
    """Train a tiny denoiser from scratch on embedded problems."""

    batch: dict[str, int] = field(default_factory=lambda: {"gsm8k": 112, "countdown": 72, "sudoku": 5})
    """Number of examples of each task per step and process."""
    steps: int = 3000
    """Number of optimiser steps."""
    hidden_size: int = 128
    """Width of the denoiser."""
    num_layers: int = 6
    """Number of transformer blocks."""
    num_heads: int = 4
    """Number of attention heads."""
    attention: str = "prompt-causal"
    """"prompt-causal": the prompt sees only itself, so that decoding reads it once; or "bidirectional"."""
    muon_lr: float = 0.009
    """Learning rate of Muon, which trains the matrices of the blocks; its updates have AdamW's size."""
    adamw_lr: float = 3e-3
    """Learning rate of AdamW, which trains embeddings and norms."""
    weight_decay: float = 0.01
    """Weight decay of Muon."""
    warmup: int = 50
    """Number of steps of linear warm-up."""
    flat: float = 0.4
    """Fraction of the steps before the linear decay to zero begins."""
    ema: float = 0.998
    """Decay of the moving average of the weights, which is what is saved."""
    bf16: bool = True
    """Run forward and backward passes in bfloat16; weights and optimisers stay in float32."""
    init: str | None = None
    """Denoiser whose weights to start from, by name or folder, one that sft has made; None starts from scratch."""
    seed: int = 0
    """Random seed for weights, problems and masks."""
    threads: int = 1
    """Number of torch threads per process; 0 keeps torch's default."""
    log_every: int = 50
    """Number of steps between lines of the log."""
    checkpoint_every: int = 50
    """Number of steps between checkpoints, each with a denoiser folder `denoiser-<step>`."""
    run_dir: str | None = None
    """Folder of the run; None makes one in runs/."""
    resume: str | None = None
    """Folder of a run to continue."""


def masked_loss(logits: Tensor, tokens: Tensor, masked: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The count form of LLaDA's loss.

    Args:
        logits: ``[B, L, V]``. tokens: ``[B, L]`` int64, the clean completion. masked: ``[B, L]`` bool.

    Returns:
        The mean over rows of the row's mean cross-entropy at its masked tokens (weight n / l over n tokens), in nats.
    """
    cross_entropy = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
    rows = (cross_entropy * masked).sum(dim=1) / masked.sum(dim=1)
    return rows.mean(), {"loss": rows.mean().detach()}


def build_tokenizer(tasks: list[GeneratedTask], samples: int = 3000):
    """A word-level transformers tokenizer for the words of embedded problems and every small integer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = set()
    rng = np.random.default_rng(0)
    for task in tasks:
        for i in range(samples):
            problem, completion = task.example(i, rng)
            words.update(f"{problem.prompt} {completion}".split())
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>", "unk_token": "<unk>"}
    integers = [str(n) for n in range(LARGEST_INTEGER + 1)]
    vocabulary = [*special.values(), *integers, *sorted(words - set(integers))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **special
    )


def draw_batch(
    task: GeneratedTask, size: int, tokenizer, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Examples with masks: input tokens and attention mask ``[B, P + L]``, completion and masked ``[B, L]``.

    The numbers of masked tokens are stratified over the batch: row b's is uniform on the b-th of B slices of 1..L.
    """
    examples = [task.example(int(rng.integers(len(task))), rng) for _ in range(size)]
    length = task.gen_length
    prompt = tokenizer([problem.prompt for problem, _ in examples], padding=True, return_tensors="pt")
    tokens = torch.full((size, length), tokenizer.eos_token_id)
    for row, completion in zip(tokens, tokenizer([text for _, text in examples])["input_ids"], strict=True):
        row[: len(completion)] = torch.tensor(completion)
    counts = np.floor(rng.permutation(np.arange(size) + rng.random(size)) / size * length) + 1
    ranks = rng.random((size, length)).argsort(axis=1).argsort(axis=1)
    masked = torch.from_numpy(ranks < counts[:, None])
    inputs = torch.cat([prompt["input_ids"], tokens.masked_fill(masked, tokenizer.mask_token_id)], dim=1)
    attention_mask = torch.cat([prompt["attention_mask"], torch.ones_like(tokens)], dim=1)
    return inputs, attention_mask, tokens, masked


@own_threads
def train(config: SFTConfig) -> Path:
    """Train, and write a denoiser folder ``denoiser`` into the run's folder. Returns the run's folder.

    Several processes (`accelerate launch` or `torch.distributed.run`) share the work; each draws its own examples.
    """
    at_least_one(config, "steps", "log_every", "checkpoint_every")
    pattern = AttentionPattern(config.attention)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device, processes = accelerator.device, Processes(accelerator)
    tasks = {name: cast(GeneratedTask, make_task(name)) for name in config.batch}
    tokenizer = build_tokenizer(list(tasks.values()))
    with seeded(config.seed):
        master = _build_model(config, tokenizer).to(device)
    if config.init:
        _start_from(config.init, master, tokenizer)
    average = copy.deepcopy(master)
    worker = copy.deepcopy(master).bfloat16() if config.bf16 else copy.deepcopy(master)
    matrices, rest = linear_and_rest(master, dict(master.named_parameters()))
    optimizers = [
        muon(matrices, config.muon_lr, config.weight_decay),
        torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    run = Run("sft", config, processes, totals=())

    losses, since = [], time.time()
    examples = sum(config.batch.values())
    sizes = [p.numel() for p in master.parameters()]
    parts = {"master": master, "average": average, "optimizers": optimizers}

    def saved(done: int) -> None:
        save_denoiser(average, tokenizer, run.folder / f"denoiser-{done:06d}")

    with run:
        for step in run.steps(config.steps, parts, show=False, saved=saved):
            # Everything drawn in a step follows from (seed, process, step), so a resumed run needs no generator state.
            rng = np.random.default_rng([config.seed, processes.rank, step])
            rate = _schedule(step, config)
            for optimizer, base in zip(optimizers, (config.muon_lr, config.adamw_lr), strict=True):
                optimizer.param_groups[0]["lr"] = base * rate
            with torch.no_grad():
                torch._foreach_copy_(list(worker.parameters()), list(master.parameters()))
            row = {}
            for name, size in config.batch.items():
                inputs, mask, tokens, masked = (t.to(device) for t in draw_batch(tasks[name], size, tokenizer, rng))
                positions, length = count_positions(mask), tokens.shape[1]
                visible = pattern.sees(positions, positions, mask.sum(dim=1) - length)
                logits = worker(
                    input_ids=inputs,
                    attention_mask=additive(visible, worker.dtype),
                    position_ids=positions.clamp(min=0),
                    logits_to_keep=length,
                ).logits
                loss, metrics = masked_loss(logits, tokens, masked)
                (loss * size / examples).backward()
                row[f"loss/{name}"] = metrics["loss"].item()
            losses.append(row)
            gradient = torch.cat([p.grad.flatten().float() for p in worker.parameters()])
            for p, part in zip(master.parameters(), processes.mean(gradient).split(sizes), strict=True):
                p.grad = part.view_as(p)
            worker.zero_grad()
            for optimizer in optimizers:
                optimizer.step()
            done = step + 1
            with torch.no_grad():
                decay = min(config.ema, done / (done + 10))
                torch._foreach_lerp_(list(average.parameters()), list(master.parameters()), 1 - decay)

            if run.main and (done % config.log_every == 0 or done == config.steps):
                means = {name: float(np.mean([row[name] for row in losses])) for name in row}
                speed = examples * processes.count * len(losses) / (time.time() - since)
                run.log(done, means | {"learning_rate": config.muon_lr * rate, "examples_per_second": speed})
                shown = " ".join(f"{name} {value:.3f}" for name, value in means.items())
                print(f"step {done}/{config.steps} {shown} {speed:.0f}/s", flush=True)
                losses, since = [], time.time()
        if run.main:
            save_denoiser(average, tokenizer, run.folder / "denoiser")
            run.finish({"steps": config.steps, "denoiser": "denoiser"})
            print(f"denoiser: {run.folder / 'denoiser'}")
    return run.folder


def save_denoiser(model, tokenizer, folder: Path) -> None:
    """Write a folder that `load_denoiser` takes: bfloat16 safetensors, config and tokenizer."""
    with written(folder) as temporary:
        copy.deepcopy(model).bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _start_from(init: str, model, tokenizer) -> None:
    """Copy the weights of a denoiser. Raises ValueError for one of another shape, attention or vocabulary."""
    denoiser = load_denoiser(init, "cpu", "float32")
    if not isinstance(denoiser, PretrainedDenoiser):
        raise ValueError(f"init={init!r}: has no weights to start from.")
    weights = denoiser.model.state_dict()
    same = {name: p.shape for name, p in model.state_dict().items()} == {name: p.shape for name, p in weights.items()}
    words, attention = tokenizer.get_vocab(), model.config.attention_pattern
    if not (same and denoiser.tokenizer.get_vocab() == words and denoiser.pattern.name == attention):
        raise ValueError(f"init={init!r}: has other words, sizes or attention than the denoiser that sft would train.")
    model.load_state_dict(weights)


def _build_model(config: SFTConfig, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    model_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # type: ignore[call-arg]  # 2.6 times faster than sdpa in bfloat16 on a CPU at this size
    )
    model_config.is_causal = False
    model_config.attention_pattern = config.attention
    model_config.mask_token_id = tokenizer.mask_token_id
    return LlamaForCausalLM(model_config)


def _schedule(step: int, config: SFTConfig) -> float:
    """Linear warm-up, flat, linear decay to zero."""
    decay = (1 - step / config.steps) / (1 - config.flat)
    return min(1.0, (step + 1) / config.warmup, decay)
