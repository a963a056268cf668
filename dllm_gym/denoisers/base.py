"""What every denoiser is to the rest of the project. A denoiser knows nothing of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dllm_gym.decoding.sampling import draw, drawing_logits
from dllm_gym.transfer import onto
from dllm_gym.types import Canvas, Outline, Prediction, Score, TokenSampling

CHUNK = 1 << 24
"""Logits (positions x vocabulary) that stand in float32 at any one time: 64 MiB."""

ARGMAX = TokenSampling()


class Denoiser(ABC):
    """A masked diffusion language model: `predict` decodes with it, `score` trains it.

    A subclass gives `logits`; the rest then works. A model with an expensive head gives `encode` and `head` too, so
    that the head runs only where something is masked.
    """

    tokenizer: Any
    """A transformers tokenizer."""
    mask_token_id: int
    eos_token_id: int
    """The token that fills a canvas after its end."""
    eos_token_ids: frozenset[int]
    """Every token that ends a completion."""
    vocab_size: int
    """Width V of the logits."""
    context_length: int
    """Most tokens that prompt and completion may have together."""
    device: torch.device
    prompt_tokens: int | None = None
    """A prompt's tokens are below this, for example the rows of an embedding; None: they may be any."""
    name: str = "denoiser"
    """What errors call it."""
    default_dataset: str = "hub"
    """The problems that an environment takes unless it is told: "hub" or "embedded"."""
    block_size: int | None = None
    """Number of positions per block of a block-causal denoiser, which decodes in these blocks only; None for others."""
    caches: tuple[str, ...] = ("none",)
    """What a decoding session may keep between forward passes; the first is exact, and is what "auto" takes."""

    @abstractmethod
    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits of the token AT each position, whatever the model's own convention.

        Args:
            tokens: ``[B, T]`` int64, mask tokens where unknown.
            attention_mask: ``[B, T]`` bool, False at (left) padding; None: no padding.
            positions: ``[B, S]`` int64, the columns asked for; None: all.

        Returns:
            ``[B, T, V]`` or ``[B, S, V]``.
        """

    def encode(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """What the head reads, ``[B, T, H]``."""
        return self.logits(tokens, attention_mask)

    def head(self, features: Tensor) -> Tensor:
        """Logits ``[N, V]`` of features ``[N, H]``."""
        return features

    def features(self, canvas: Canvas, at: Tensor, padded: bool | None = None) -> Tensor:
        """What the head reads at some positions: ``[N, H]``, row by row.

        Args:
            canvas: B rows of L positions.
            at: ``[B, L]`` bool, the positions; on the device, or on the CPU, where nobody has to wait for them.
            padded: whether a prompt has padding; None: look, and wait for the device.
        """
        tokens, attention_mask = inputs_of(canvas)
        return self.encode(tokens, attention_mask)[:, -canvas.tokens.shape[1] :][places(at, tokens.device)]

    def scoring_features(self, canvas: Canvas, targets: Tensor, at: Tensor) -> Tensor:
        """The same for `score`, whose masked tokens ``targets`` ``[B, L]`` are known."""
        return self.features(canvas, at)

    def block_offset(self, prompt_length: Tensor) -> Tensor | int:
        """``[B, 1]`` int64: how many of the prompt's last tokens are in the first block of the completion.

        A block-causal denoiser counts its blocks from the first token of the prompt, whose length is
        ``prompt_length`` ``[B]`` int64; for others it is 0.
        """
        return 0 if self.block_size is None else prompt_length[:, None] % self.block_size

    def make_memory(self, cache: str, num_rows: int, block_length: int) -> Memory:
        """What a decoding session keeps of its rows between forward passes.

        Args:
            cache: "auto", or one of `caches`.
            num_rows: R.
            block_length: blocks are decoded left to right.

        Raises:
            ValueError: a cache that this denoiser does not have.
        """
        self.resolve_cache(cache)
        return Recompute(self, num_rows)

    def resolve_cache(self, cache: str) -> str:
        """``cache``, or the exact one for "auto". Raises ValueError for one that this denoiser does not have."""
        if cache != "auto" and cache not in self.caches:
            allowed = ", ".join(map(repr, ("auto", *self.caches)))
            raise ValueError(f"cache={cache!r}: {self.name} can be decoded with {allowed}.")
        return self.caches[0] if cache == "auto" else cache

    def approximates(self, cache: str) -> bool:
        """Whether predictions with this cache differ from those without. Raises as `resolve_cache`."""
        return self.resolve_cache(cache) not in ("none", self.caches[0])

    @torch.inference_mode()
    def predict(
        self,
        canvas: Canvas,
        k: int = 1,
        sampling: TokenSampling = ARGMAX,
        uniforms: Tensor | None = None,
        *,
        at: Tensor | None = None,
        encode: Callable[[Canvas, Tensor], Tensor] | None = None,
        check: bool = True,
    ) -> Prediction:
        """One forward pass: token, confidence and entropy at every masked position (zeros elsewhere).

        The mask token itself is never predicted: its logit is left out of the softmax. One chunked pass over the
        vocabulary; no ``[B, L, V]`` tensor ever stands.

        Args:
            canvas: B rows of L positions.
            k: probabilities per position.
            sampling: how tokens are drawn. Its penalty for the end token changes the logits themselves, so that it is
                in all probabilities here.
            uniforms: ``[B, L]`` float32 in [0, 1), needed at a temperature above 0: one number per position, read off
                the inverse distribution function, so that a row's draw does not depend on the rows beside it.
            at: ``[B, L]`` bool, the masked positions to predict; None: all of them. On the CPU: see `features`.
            encode: the forward pass, which may remember earlier ones; None: `features`.
            check: wait for the device, and see whether all is finite. If False, look at the entropy later.

        Returns:
            `Prediction`, ``[B, L]`` and ``[B, L, k]``.

        Raises:
            ValueError: temperature above 0 without uniforms.
            FloatingPointError: the logits of a masked position are NaN, infinite, or all minus infinity; then the
                entropy is NaN there.
        """
        at = canvas.masked if at is None else at
        rows, columns = places(at, canvas.tokens.device)
        features = (encode or self.features)(canvas, at)
        drawn_at = None
        if sampling.temperature > 0:
            if uniforms is None:
                raise ValueError(
                    f"temperature={sampling.temperature}: tokens are drawn, give uniforms, [B, L] in [0, 1)."
                )
            drawn_at = uniforms[rows, columns]
        if sampling.end_tokens_last:
            ends = torch.tensor(sorted(self.eos_token_ids), device=features.device)
        parts = []
        for start, size in self._chunks(len(features)):
            logits = self.head(features[start : start + size]).float()
            logits[:, self.mask_token_id] = -torch.inf
            if sampling.end_token_penalty:
                logits[:, self.eos_token_id] -= sampling.end_token_penalty
            shown = probability = logits.softmax(dim=-1)
            if drawn_at is not None or sampling.confidence == "tempered":
                drawing = drawing_logits(logits, sampling)
                if sampling.confidence == "tempered":
                    shown = drawing.softmax(dim=-1)
            top = shown.topk(k, dim=-1)
            entropy = -torch.xlogy(shown, shown).sum(dim=-1)
            token, draw_log_prob, confidence = top.indices[:, 0], torch.zeros_like(entropy), top.values
            if drawn_at is not None:
                token = draw(drawing, drawn_at[start : start + size])
                draw_log_prob = drawing.gather(1, token[:, None])[:, 0] - drawing.logsumexp(dim=-1)
            if sampling.end_tokens_last:
                confidence = confidence.masked_fill(torch.isin(token, ends)[:, None], 0.0)
            parts.append((token, probability.gather(1, token[:, None])[:, 0], draw_log_prob, confidence, entropy))
        if check and not all(part[-1].isfinite().all() for part in parts):
            raise FloatingPointError(self.not_finite(canvas))

        def scatter(values: Tensor) -> Tensor:
            full = values.new_zeros((*canvas.masked.shape, *values.shape[1:]))
            full[rows, columns] = values
            return full

        return Prediction(*(scatter(torch.cat(values)) for values in zip(*parts, strict=True)))

    def score(self, canvas: Canvas, targets: Tensor, scored: Tensor, temperature: float = 1.0) -> Score:
        """One forward pass: log-probability and centred logit of given tokens, differentiable.

        As in `predict`, the mask token is left out of the vocabulary. Where the logits of all scored positions exceed
        `CHUNK`, the head runs over chunks of positions whose logits are recomputed in the backward pass: at no time do
        more stand.

        Args:
            canvas: B rows of L positions, partly masked.
            targets: ``[B, L]`` int64, the tokens to score; a block-causal denoiser also reads those of earlier blocks.
            scored: ``[B, L]`` bool, where.
            temperature: logits are divided by it, as for tokens that are drawn at it; more than 0.

        Raises:
            FloatingPointError: as `predict`.
        """
        rows, columns = scored.nonzero(as_tuple=True)
        features, targets = self.scoring_features(canvas, targets, scored), targets[rows, columns]
        log_prob, centred, normaliser = self._in_chunks(self._score, features, targets, temperature)
        if not normaliser.isfinite().all():
            raise FloatingPointError(self.not_finite(canvas))
        zeros = log_prob.new_zeros(scored.shape)
        return Score(zeros.index_put((rows, columns), log_prob), zeros.index_put((rows, columns), centred))

    def _score(self, features: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.head(features).float() / temperature
        mask = targets.new_tensor([self.mask_token_id])
        log_normaliser = logits.index_fill(1, mask, -torch.inf).logsumexp(dim=-1)
        mean = logits.index_fill(1, mask, 0.0).sum(dim=-1) / (logits.shape[-1] - 1)
        target = logits.gather(1, targets[:, None])[:, 0]
        return target - log_normaliser, target - mean, log_normaliser.detach()

    def score_step(
        self, canvas: Canvas, targets: Tensor, at: Tensor, k: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """One forward pass of a decoding step, differentiable: what is written, and what a sampler sees.

        Args:
            canvas: B rows of L positions, before the step.
            targets: ``[B, L]`` int64, the tokens that were drawn.
            at: ``[B, L]`` bool, the masked positions that the step predicted.
            k: number of probabilities per position.
            temperature: at which the tokens were drawn; more than 0.

        Returns:
            Log-probabilities ``[B, L]`` of the tokens at the temperature, and the k highest untempered probabilities
            ``[B, L, k]``; zeros elsewhere.

        Raises:
            FloatingPointError: as `predict`.
        """
        rows, columns = places(at, canvas.tokens.device)
        features, targets = self.features(canvas, at), targets[rows, columns]
        log_prob, confidence = self._in_chunks(self._score_step, features, targets, k, temperature)
        if not log_prob.detach().isfinite().all():
            raise FloatingPointError(self.not_finite(canvas))
        full = log_prob.new_zeros(at.shape).index_put((rows, columns), log_prob)
        return full, confidence.new_zeros((*at.shape, k)).index_put((rows, columns), confidence)

    def _score_step(self, features: Tensor, targets: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.head(features).float()
        logits = logits.index_fill(1, targets.new_tensor([self.mask_token_id]), -torch.inf)
        log_prob = (logits / temperature).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        return log_prob, logits.softmax(dim=-1).topk(k, dim=-1).values

    def not_finite(self, canvas: Canvas) -> str:
        """What to say where the logits of a canvas turned out to be no numbers."""
        return f"{self.name}: its logits are not finite."

    def _in_chunks(self, score: Callable, features: Tensor, targets: Tensor, *settings) -> tuple[Tensor, ...]:
        """What ``score`` says of all positions; where there are several chunks, recomputed in the backward pass."""
        chunks, parts = self._chunks(len(features)), []
        if torch.is_grad_enabled() and len(chunks) > 1:
            score = partial(checkpoint, score, use_reentrant=False)
        for start, size in chunks:
            parts.append(score(features[start : start + size], targets[start : start + size], *settings))
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def _chunks(self, positions: int) -> list[tuple[int, int]]:
        """Start and size of runs of positions whose logits fit into `CHUNK`; at least one, perhaps empty."""
        size = max(1, CHUNK // self.vocab_size)
        return [(start, size) for start in range(0, max(positions, 1), size)]

    def __deepcopy__(self, memo) -> Denoiser:
        """Gymnasium deep-copies specs and their keyword arguments; weights exist once."""
        return self


class Memory(ABC):
    """What a decoding session keeps of R rows between forward passes.

    Rows, outlines and ``at`` are on the CPU: the host prepares a forward pass without waiting for the device.
    """

    positions: Tensor
    """``[R]`` int64, on the CPU: token positions forwarded for each row since it began."""
    looks_ahead = True
    """Whether positions beyond the active block are predicted too."""

    @abstractmethod
    def encode(self, canvas: Canvas, outline: Outline, rows: Tensor, at: Tensor) -> Tensor:
        """The forward pass for rows ``[B]`` int64, ascending: features ``[N, H]`` of ``at`` ``[B, L]`` bool."""

    def forget(self, rows: Tensor) -> None:
        """Begin anew with some rows."""
        self.positions = self.positions.index_fill(0, rows, 0)


class Recompute(Memory):
    """Keeps nothing: every forward pass reads prompt and completion anew."""

    def __init__(self, denoiser: Denoiser, num_rows: int):
        self.denoiser = denoiser
        self.positions = torch.zeros(num_rows, dtype=torch.int64)
        self.looks_ahead = denoiser.block_size is None

    def encode(self, canvas: Canvas, outline: Outline, rows: Tensor, at: Tensor) -> Tensor:
        self.positions = self.positions.index_add(0, rows, outline.prompt_length + canvas.tokens.shape[1])
        return self.denoiser.features(canvas, at, bool((outline.prompt_length < canvas.prompt.shape[1]).any()))


class TrainableDenoiser(Denoiser):
    """A denoiser with weights: what a trainer needs."""

    model: Any
    """An ``nn.Module`` with all weights; `score` is differentiable with respect to them."""


def places(at: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column, ``[N]`` int64 each on a device, of what is True in ``at``; waits only if that is there too."""
    rows, columns = onto(device, *at.nonzero(as_tuple=True))
    return rows, columns


def inputs_of(canvas: Canvas) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask ``[B, T]`` of prompts and completions."""
    tokens = torch.cat([canvas.prompt, canvas.tokens], dim=1)
    return tokens, torch.cat([canvas.prompt_mask, torch.ones_like(canvas.masked)], dim=1)
