"""What makes a checkpoint one of a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """Checkpoints that are read alike. None has causal attention."""

    model_types: tuple[str, ...]
    """What ``model_type`` says in their config.json."""
    read: Callable[[str, Path, dict], tuple]
    """``(given, folder, config.json) -> (transformers class, its config)``; raises ValueError beginning with given."""
    names: dict[str, str] = field(default_factory=dict)
    """What transformers calls a module, and what the checkpoint calls it; where they differ."""
    attention_pattern: str = "bidirectional"
    """What a position sees, unless config.json says otherwise; see `dllm_gym.denoisers.attention`."""
    block_causal: bool = False
    """Whether a checkpoint may be block-causal, by its config.json or by `load_denoiser`'s ``block_size``."""
    block_size: int | None = None
    """Positions per block of a block-causal family whose config.json does not say it."""
    shifted: bool = False
    """Whether column i - 1 predicts token i, as in the autoregressive model that the weights began as."""
    published: bool = False
    """Whether the tokenizer and the data are its authors': end tokens by their names, and problems from the hub."""
