"""Denoisers that are transformers models with bidirectional attention, loaded strictly and without remote code."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dllm_gym.denoisers.base import Denoiser

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {"embedded": ASSETS / "embedded", "embedded-early": ASSETS / "embedded-early"}


class PretrainedDenoiser(Denoiser):
    """A bidirectional transformers causal-LM class, used as a masked denoiser: position i predicts the token AT i.

    Padding on the left is masked out of attention and positions count from the first real token, so a padded row
    equals the row alone.
    """

    def __init__(self, model, tokenizer):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.mask_token_id = tokenizer.mask_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.eos_token_ids = frozenset({tokenizer.eos_token_id})
        self.vocab_size = model.config.vocab_size
        self.context_length = model.config.max_position_embeddings
        self.device = model.device
        self.default_dataset = "embedded"

    def encode(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None or attention_mask.all():
            return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return self.model.model(
            input_ids=tokens, attention_mask=attention_mask.long(), position_ids=position_ids, use_cache=False
        ).last_hidden_state

    def head(self, features: Tensor) -> Tensor:
        return self.model.lm_head(features)

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        features = self.encode(tokens, attention_mask)
        if positions is not None:
            features = features.gather(1, positions[..., None].expand(-1, -1, features.shape[-1]))
        return self.head(features)


def load_denoiser(name_or_path: str, device: str = "auto", dtype: str | torch.dtype = "auto") -> Denoiser:
    """A denoiser by name or folder.

    Args:
        name_or_path: "embedded", "embedded-early", or a folder that `train_policy.py sft` wrote (config.json of
            model_type "llama" with ``is_causal: false``, safetensors weights, a tokenizer with a mask token).
        device: "auto" (CUDA where there is one), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float32 on the CPU), or a torch dtype or its name.

    Raises:
        FileNotFoundError: neither a known name nor a folder.
        ValueError: a checkpoint of another kind, truncated, or with missing, extra or misshapen weights.
    """
    path = EMBEDDED.get(str(name_or_path), Path(name_or_path))
    given = f"denoiser={str(name_or_path)!r}"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{given}: must be one of {sorted(EMBEDDED)}, "
            f"or a folder with config.json, model.safetensors and a tokenizer."
        )
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{given}: config.json is not JSON ({error}).") from None
    if config.get("model_type") != "llama" or config.get("is_causal", True):
        raise ValueError(
            f"{given}: model_type={config.get('model_type')!r}, is_causal={config.get('is_causal', True)}; "
            f"can be read: model_type 'llama' with is_causal false, as `train_policy.py sft` writes it."
        )
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        with _quiet():
            model, report = LlamaForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # the report names them, and is refused below
                output_loading_info=True,
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{given}: the checkpoint cannot be read ({reason}).") from error
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys and kind.endswith("keys")}
    if wrong:
        raise ValueError(f"{given}: the weights do not fit config.json: {wrong}.")
    if tokenizer.mask_token_id is None:
        raise ValueError(f"{given}: the tokenizer has no mask token.")
    return PretrainedDenoiser(model.to(device), tokenizer)


@contextmanager
def _quiet():
    """Without transformers' loading bar and load report: what is wrong becomes an error here."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
