"""Denoisers that are transformers models without a causal mask: embedded, LLaDA, Dream, SDAR, A2D, and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_gym.denoisers import checkpoints, layouts
from dllm_gym.denoisers.attention import BIDIRECTIONAL, AttentionPattern, additive, count_positions
from dllm_gym.denoisers.base import Memory, Recompute, TrainableDenoiser, inputs_of, places
from dllm_gym.denoisers.cache import KeyValueCache
from dllm_gym.denoisers.families import find_family
from dllm_gym.files import written
from dllm_gym.types import Canvas

CACHES = {
    "bidirectional": ("none", "prefix", "dual"),
    "prompt-causal": ("prompt", "none", "prefix", "dual"),
    "block-causal": ("prefix", "none"),
}
"""What can be kept of a denoiser with this attention pattern; the first is exact."""


class PretrainedDenoiser(TrainableDenoiser):
    """A transformers causal-LM class without a causal mask, used as a masked denoiser.

    What a position sees is the denoiser's `pattern`; see `dllm_gym.denoisers.attention`.

    Padding on the left is masked out of attention and positions count from the first real token, so a padded row
    equals the row alone.

    Some models (Dream) predict token i in column i - 1, as the autoregressive model did that they began as. Then
    `encode` moves everything one column to the right. The first real token of a row has no column before it and takes
    its own, as Dream's generation code does: what is predicted there is a guess at the token after it, and means
    nothing; a prompt of at least one token keeps it out of the way.
    """

    def __init__(self, model, tokenizer):
        """Take a Llama, Qwen2 or Qwen3 ``...ForCausalLM`` whose config says ``is_causal`` false, and freeze it."""
        config = model.config
        if not hasattr(config, "end_token_ids"):
            raw, given = config.to_dict(), type(model).__name__
            checkpoints.set_tokens(given, config, raw, find_family(given, raw["model_type"]), tokenizer)
        self.model = model.eval().requires_grad_(False)
        """The transformers model, or the peft model around it."""
        self.tokenizer = tokenizer
        self.mask_token_id = config.mask_token_id
        self.eos_token_id = config.fill_token_id
        self.eos_token_ids = frozenset(config.end_token_ids)
        self.vocab_size = config.vocab_size
        self.context_length = config.max_position_embeddings
        self.device = model.get_input_embeddings().weight.device
        self.quantization: str | None = None
        """None, or how the matrices of the layers are kept."""
        self.dtype = model.dtype
        """What it computes in."""
        self.prompt_tokens = config.vocab_size
        self.name = f"denoiser {model.name_or_path!r}"
        self.default_dataset = config.default_dataset
        self.shifted = config.shifted
        self.originals: Path | None = None
        """Folder with the small files of the published checkpoint that this is read from; None for others."""
        causal = config.attention_pattern == "block-causal"
        self.block_size = config.block_size if causal else None
        self.pattern = AttentionPattern(config.attention_pattern, self.block_size)
        """What a position sees."""
        self.caches = CACHES[self.pattern.name]
        if self.shifted and self.block_size:
            raise ValueError(
                f"{self.name}: a block-causal denoiser whose column i - 1 predicts token i cannot be decoded."
            )
        self.takes_no_mask = config._attn_implementation == "flash_attention_2"
        """Whether attention takes padding only, and no mask of what each position sees."""
        if self.takes_no_mask:
            self.caches = ("none",)

    @property
    def causal_lm(self):
        """The transformers model itself, with whatever adapters peft has put into it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def encode(
        self, tokens: Tensor, attention_mask: Tensor | None = None, prompt_length: Tensor | None = None
    ) -> Tensor:
        """What the head reads, ``[B, T, H]``. ``prompt_length`` ``[B]`` int64 is for prompt-causal denoisers.

        Raises:
            ValueError: a prompt-causal denoiser is not told where the completion begins.
        """
        first: Tensor | int = 0
        if attention_mask is not None:
            first = attention_mask.int().argmax(dim=1, keepdim=True)
        position = count_positions(torch.ones_like(tokens) if attention_mask is None else attention_mask)
        if self.pattern == BIDIRECTIONAL and (attention_mask is None or self.takes_no_mask):
            padding = None if attention_mask is None else attention_mask.long()
            features = self._forward(tokens, padding, position)
        else:
            if prompt_length is None and self.pattern.name == "prompt-causal":
                raise ValueError(
                    f"{self.name} is prompt-causal: give prompt_length, [B] int64, the number of tokens before the "
                    f"completion."
                )
            lengths = tokens.new_zeros(len(tokens)) if prompt_length is None else prompt_length
            features = self.run(tokens, position, self.pattern.sees(position, position, lengths))
        if self.shifted:
            columns = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
            features = _take(features, (columns - 1).clamp(min=first))
        return features

    def run(self, tokens: Tensor, position: Tensor, visible: Tensor, kept: Any = None) -> Tensor:
        """Hidden states ``[B, W, H]`` of W columns, not shifted.

        Args:
            tokens: ``[B, W]`` int64.
            position: ``[B, W]`` int64, counted from the first real token; -1 at padding.
            visible: ``[B, W, C]`` bool, which of the C columns attended to each one sees.
            kept: gives the keys and values of these C, as a transformers cache does; None: they are the W columns.
        """
        return self._forward(tokens, additive(visible, self.dtype), position, kept)

    def _forward(self, tokens: Tensor, attention_mask: Tensor | None, position: Tensor, kept: Any = None) -> Tensor:
        hidden = self.causal_lm.model(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=position.clamp(min=0),
            past_key_values=kept,
            use_cache=False,
        ).last_hidden_state
        return hidden.to(tokens.device)  # with a device map they may end up elsewhere

    def features(self, canvas: Canvas, at: Tensor, padded: bool | None = None) -> Tensor:
        tokens, attention_mask = inputs_of(canvas)
        padded = not canvas.prompt_mask.all() if padded is None else padded
        features = self.encode(tokens, attention_mask if padded else None, canvas.prompt_length)
        return features[:, -canvas.tokens.shape[1] :][places(at, tokens.device)]

    def scoring_features(self, canvas: Canvas, targets: Tensor, at: Tensor) -> Tensor:
        """Of a block-causal denoiser, a masked block sees earlier ones unmasked, in one forward pass of both copies.

        arXiv 2503.09573, section 3.2 and figure 3: the masked copy of a block attends to itself and to the clean copy
        of earlier blocks; the clean copy to itself and earlier blocks.
        """
        width, length = canvas.prompt.shape[1], canvas.tokens.shape[1]
        if self.block_size is None or self.block_size >= width + length:
            return self.features(canvas, at)
        size = self.block_size
        shared = min(width, size - 1)  # columns of the prompt that may be in a block with masked tokens
        tokens, attention_mask = inputs_of(canvas)
        clean = torch.cat([canvas.prompt, torch.where(canvas.masked, targets, canvas.tokens)], dim=1)
        position = count_positions(attention_mask)
        both = torch.cat([position, position[:, width - shared :]], dim=1)
        block = both.div(size, rounding_mode="floor")
        masked = torch.arange(both.shape[1], device=both.device) >= width + length
        query, key = block[:, :, None], block[:, None, :]
        visible = torch.where(
            masked, masked[:, None] & (query == key), torch.where(masked[:, None], key < query, key <= query)
        )
        visible = visible & (both >= 0)[:, None]
        hidden = self.run(torch.cat([clean, tokens[:, width - shared :]], dim=1), both, visible)
        return hidden[:, -length:][places(at, hidden.device)]

    def make_memory(self, cache: str, num_rows: int, block_length: int) -> Memory:
        cache = self.resolve_cache(cache)
        if cache == "none":
            return Recompute(self, num_rows)
        return KeyValueCache(self, cache, num_rows, block_length)

    def cache_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the keys and values of so many rows and columns."""
        config = self.causal_lm.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head * rows * columns
        return numbers * self.dtype.itemsize

    def weights_version(self) -> tuple:
        """Another value after any change of the weights: an optimiser's step, or other weights in their place."""
        return tuple((p.data_ptr(), p._version) for p in self.model.parameters())

    def head(self, features: Tensor) -> Tensor:
        return self.causal_lm.lm_head(features).to(features.device)

    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        prompt_length: Tensor | None = None,
    ) -> Tensor:
        features = self.encode(tokens, attention_mask, prompt_length)
        return self.head(features if positions is None else _take(features, positions))

    @torch.no_grad()
    def not_finite(self, canvas: Canvas) -> str:
        """Names dtype and the first weight or layer that is no number: a broken checkpoint, or too small a range."""
        dtype = str(self.dtype).removeprefix("torch.")
        broken = (name for name, p in self.model.named_parameters() if not (p.is_meta or p.isfinite().all()))
        weight = next(broken, None)
        layer = None if weight else self._first_layer_not_finite(*inputs_of(canvas), canvas.prompt_length)
        what = f"the weight {weight}" if weight else f"the output of {layer or 'the head'}"
        advice = "the checkpoint is broken" if weight else "its weights are too large"
        if dtype == "float16":
            advice = "give dtype='bfloat16' or 'float32', whose range is wider"
        return f"{self.name} in {dtype}: {what} is not finite; {advice}."

    def _first_layer_not_finite(self, tokens: Tensor, attention_mask: Tensor, prompt_length: Tensor) -> str | None:
        """The module that first gives a value at a real token that is no number."""
        found: list[str] = []
        hooks = []

        def look(name: str, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            known = isinstance(output, Tensor) and output.shape[:2] == attention_mask.shape
            if known and not output[attention_mask.to(output.device)].isfinite().all():
                found.append(name)

        for name, module in self.causal_lm.named_modules():
            if name:
                hooks.append(module.register_forward_hook(lambda _, __, output, name=name: look(name, output)))
        try:
            self.head(self.encode(tokens, attention_mask, prompt_length))
        finally:
            for hook in hooks:
                hook.remove()
        return next(iter(found), None)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the layers in place, for any number of rows and columns; weights and their names stay as they are."""
        for layer in self.causal_lm.model.layers:
            layer.self_attn.layer_idx = 0  # for a number of its own, each layer would be compiled for itself
            layer.compile(backend=backend, dynamic=True)

    def merge(self) -> PretrainedDenoiser:
        """Write the adapter, where there is one, into the weights; the denoiser is then an ordinary one again."""
        if self.quantization:
            raise ValueError(
                f"{self.name}: weights are in {self.quantization}; load the adapter without quantization, and merge."
            )
        if self.model is not self.causal_lm:
            self.model = self.model.merge_and_unload().requires_grad_(False)
        return self

    def save(self, folder: str | Path, layout: str = "transformers") -> None:
        """Write a folder that `load_denoiser` takes: safetensors in the model's dtype, config and tokenizer.

        With an adapter: only the adapter, whose base is written down as the name or folder that it was loaded from.

        Args:
            folder: where.
            layout: "transformers": as its own Llama, Qwen2 or Qwen3. "original": as the authors of the checkpoint
                publish it, so that their code and serving engines load it; names of weights, config.json, tokenizer.

        Raises:
            ValueError: the original layout of a denoiser that was not read from a published checkpoint.
            OSError: it cannot be written; a denoiser that was there is whole.
        """
        layouts.check_layout(layout)
        adapted = self.model is not self.causal_lm
        if self.quantization and not adapted:
            raise ValueError(f"{self.name}: weights in {self.quantization} are not saved; adapters on them are.")
        for config in self.model.peft_config.values() if adapted else ():
            config.base_model_name_or_path = self.causal_lm.name_or_path
        if layout == "original":
            if self.originals is None:
                raise ValueError(
                    f"layout={layout!r}: {self.name} was not read from a published checkpoint; leave the layout out."
                )
            with written(folder) as temporary, checkpoints.quiet():
                temporary.mkdir()
                if adapted:
                    layouts.write_original_adapter(self.model, self.originals, temporary)
                else:
                    layouts.write_original(self.model, self.originals, temporary, self.block_size)
            return
        with written(folder) as temporary, checkpoints.quiet():
            # peft would otherwise look the base up on the hub, to see whether its vocabulary has grown
            options = {"save_embedding_layers": False} if adapted else {}
            self.model.save_pretrained(temporary, **options)
            self.tokenizer.save_pretrained(temporary)
            if self.originals and not adapted:
                layouts.copy_small_files(self.originals, temporary / layouts.KEPT)


def _take(features: Tensor, columns: Tensor) -> Tensor:
    """Columns ``[B, S]`` of features ``[B, T, H]``."""
    return features.gather(1, columns[..., None].expand(-1, -1, features.shape[-1]))
