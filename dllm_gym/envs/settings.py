"""The settings of an environment, said once: signatures, checks, the documentation's table and flags come from here."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from dllm_gym.denoisers.base import Denoiser
from dllm_gym.rewards import Reward, get_reward
from dllm_gym.tasks.base import Task
from dllm_gym.types import TokenSampling


@dataclass(kw_only=True)
class EnvSettings:
    """What an environment is made with, beside its task. To add a setting, add a field here and use it."""

    denoiser: str | Denoiser = "embedded"
    """"embedded", "embedded-early", "oracle", a hub id, a folder, or a `Denoiser`, which environments may share."""
    dataset: str | None = None
    """"embedded", "hub", a hub id, or a local .jsonl, .csv or .parquet file; None takes what suits the denoiser."""
    split: str = "train"
    """"train" or "test", which are disjoint. Benchmarks without training problems have "test" as their default."""
    prompt_template: str | None = None
    """Path of a text file with {question} in it, for real data; None takes the task's own prompt."""
    few_shot: int = 0
    """Number of worked examples before each question, for real data."""
    allow_code_execution: bool = False
    """Must be True for tasks whose verifier runs the completion."""
    gen_length: int | None = None
    """L, the number of tokens in a completion; None takes the task's, which is 256 for real data."""
    block_length: int | None = None
    """Blocks are decoded left to right; must divide L. None means the denoiser's own block if it has one, else L."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the argmax."""
    top_p: float = 1.0
    """Draw only the most probable tokens, as few as have this probability together; 1 draws from all."""
    top_k: int | None = None
    """Draw only this many of the most probable tokens; None draws from all."""
    end_token_penalty: float = 0.0
    """Subtracted from the logit of the end token that fills a canvas, before all else; 1e9 never writes it."""
    end_tokens_last: bool = False
    """Show confidence 0 where the token to be written ends the completion, so that samplers take it last."""
    confidence: str = "untempered"
    """"untempered": probabilities and entropy of softmax(logits); "tempered": of what tokens are drawn from (Dream)."""
    confidence_k: int = 1
    """k, the number of highest probabilities shown per position."""
    reward: str | Reward = "multiplicative"
    """"multiplicative", "additive", or a callable `(score, nfe, L, alpha) -> float`."""
    alpha: float = 1.0
    """Weight of the cost of steps in the reward."""
    empty_action: str = "best"
    """What an empty set does: "best" unmasks the most confident eligible position; "noop" wastes the step."""
    max_steps: int | None = None
    """An episode ends after this many steps, with score 0; None means L. Unlike `max_episode_steps`, no truncation."""
    stop_at_eos: bool = True
    """Fill the masked positions after the end of the text at no cost, once everything before it is written."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda", or a device as torch names it."""
    cache: str = "auto"
    """Keys and values kept between forward passes: "none", "prompt", "prefix", "dual", or "auto", what is exact."""
    dtype: str = "auto"
    """The denoiser's: "auto" (bfloat16 on CUDA, float32 on a CPU), "float32", "bfloat16" or "float16"."""
    quantization: str | None = None
    """"nf4": the denoiser's matrices in 4 bits (bitsandbytes), to train adapters on; None: as they are."""
    compile: str | None = None
    """Backend of torch.compile for the denoiser's layers, "inductor" for example; None: they are not compiled."""

    @property
    def sampling(self) -> TokenSampling:
        """How tokens are drawn."""
        return TokenSampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TokenSampling)})

    @property
    def loading(self) -> dict[str, Any]:
        """How `load_denoiser` reads the denoiser."""
        return {name: getattr(self, name) for name in ("device", "dtype", "quantization", "compile")}

    def check(self) -> None:
        """Refuse values that no task and no denoiser could use. Raises ValueError."""
        self.sampling.check()
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha}: must be a finite number.")
        if self.empty_action not in ("best", "noop"):
            raise ValueError(f"empty_action={self.empty_action!r}: must be 'best' or 'noop'.")
        get_reward(self.reward)

    def resolved(self, task: Task, denoiser: Denoiser) -> EnvSettings:
        """A copy whose lengths are numbers, checked against the task and the denoiser. Raises ValueError."""
        self.check()
        length = task.gen_length if self.gen_length is None else self.gen_length
        block = (denoiser.block_size or length) if self.block_length is None else self.block_length
        max_steps = length if self.max_steps is None else self.max_steps
        for name, value in {"gen_length": length, "max_steps": max_steps}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more.")
        if block < 1 or length % block:
            divisors = [n for n in range(1, length + 1) if length % n == 0]
            raise ValueError(f"block_length={block}: must divide gen_length={length}, one of {divisors}.")
        if denoiser.block_size not in (None, block):
            raise ValueError(
                f"block_length={block}: {denoiser.name} is block-causal and writes blocks of {denoiser.block_size}; "
                f"give that, or leave it out."
            )
        denoiser.resolve_cache(self.cache)
        if not 1 <= self.confidence_k < denoiser.vocab_size:
            raise ValueError(f"confidence_k={self.confidence_k}: must be 1 to {denoiser.vocab_size - 1}.")
        return dataclasses.replace(self, gen_length=length, block_length=block, max_steps=max_steps)


def takes_settings(init: Callable) -> Callable:
    """A decorator for an ``__init__`` that collects ``**settings``: its signature names the fields of `EnvSettings`."""
    signature = inspect.signature(init)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(EnvSettings)
    ]
    init.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
    return init


def settings_table() -> str:
    """The settings as a Markdown table: name, default, and the string below the field."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(EnvSettings))).body
    rows = ["| argument | default | meaning |", "| --- | --- | --- |"]
    for field, doc in pairwise(cast(ast.ClassDef, tree).body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and field.value:
            text = " ".join(ast.literal_eval(doc.value).split())
            rows.append(f"| `{ast.unparse(field.target)}` | `{ast.unparse(field.value)}` | {text} |")
    return "\n".join(rows)
