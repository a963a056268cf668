"""Denoisers small enough to know everything about: one table row for every canvas.

`OracleDenoiser` has the exact conditionals of a joint distribution, `TabularDenoiser` any conditionals, trainable.
`dllm_gym.denoisers.enumeration` computes exactly what other denoisers only allow to estimate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dllm_gym.denoisers.base import TrainableDenoiser
from dllm_gym.oracle_joint import PROMPT, WORDS, mixture

LARGEST_TABLE = 1 << 26
"""Entries that a table may have: 512 MiB in float64."""


class Table(nn.Module):
    """The trainable part of a `TabularDenoiser`: its parameter ``table``, ``[(V + 1)**L, L, V]`` logits."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, context: Tensor) -> Tensor:
        """The rows ``[B, L, V]`` of contexts ``[B]``."""
        return self.table[context]


class TabularDenoiser(TrainableDenoiser):
    """Logits of V words at L positions, looked up by the canvas; any conditionals, consistent with a joint or not.

    The completion is the last L columns of the tokens; the prompt is ignored. Tokens 0 to V - 1 are the words "a",
    "b", ..., and V is the mask: the logits are V + 1 wide, -inf at the mask. The end token and the words of the prompt
    lie beyond, so they have probability 0 and a completion never ends early.

    Args:
        table: ``[(V + 1)**L, L, V]`` floating point, logits at every position for every context: the canvas read as a
            number with L digits to base V + 1, leftmost first. Logits at unmasked positions are never used. A copy
            becomes the parameter ``model.table``; float64 keeps enumerations exact.
        device: where the table lies.

    Raises:
        ValueError: a table of another shape.
    """

    default_dataset = "embedded"

    def __init__(self, table: Tensor, device: str | torch.device = "cpu"):
        shape = tuple(table.shape)
        if len(shape) != 3 or not 2 <= shape[2] <= len(WORDS) or shape[0] != (shape[2] + 1) ** shape[1]:
            raise ValueError(
                f"table of shape {shape}: must be [(V + 1)**L, L, V], V words from 2 to {len(WORDS)} at L positions."
            )
        _, self.length, self.num_words = shape
        self.model = Table(table.detach().clone().to(device))
        self.tokenizer = _word_tokenizer(self.num_words)
        self.mask_token_id = self.tokenizer.mask_token_id
        self.eos_token_id = self.tokenizer.eos_token_id
        self.eos_token_ids = frozenset({self.eos_token_id})
        self.vocab_size = self.num_words + 1
        self.context_length = len(PROMPT.split()) + self.length
        self.device = self.model.table.device

    @classmethod
    def from_oracle(cls, oracle: OracleDenoiser) -> TabularDenoiser:
        """A trainable copy of an oracle's conditionals: consistent, until it is trained."""
        return cls(oracle.model.table, oracle.device)

    @classmethod
    def random(cls, num_words: int, length: int, seed: int = 0, scale: float = 1.0) -> TabularDenoiser:
        """Independent normal logits of standard deviation ``scale``: conditionals that fit to no joint."""
        _check_size(num_words, length)
        generator = torch.Generator().manual_seed(seed)
        shape = ((num_words + 1) ** length, length, num_words)
        return cls(scale * torch.randn(shape, generator=generator, dtype=torch.float64))

    def encode(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the words, ``[B, T, V]``; zeros at the prompt."""
        rows = self.model(self.context(tokens[:, -self.length :]))
        return F.pad(rows, (0, 0, tokens.shape[1] - self.length, 0))

    def head(self, features: Tensor) -> Tensor:
        # The mask's logit is 0, not -inf: `predict` and `score` leave it out, and `score` takes means of logits.
        return F.pad(features, (0, 1))

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        features = self.encode(tokens)
        if positions is not None:
            features = features.gather(1, positions[..., None].expand(-1, -1, self.num_words))
        return F.pad(features, (0, 1), value=-torch.inf)

    def context(self, canvas: Tensor) -> Tensor:
        """The table's row ``[B]`` for each canvas ``[B, L]`` int64 of words and masks."""
        if canvas.shape[1] != self.length or (canvas > self.mask_token_id).any():
            raise ValueError(
                f"a completion must be {self.length} tokens of 0 to {self.mask_token_id} (words and the mask): "
                f"use gen_length={self.length}."
            )
        return number(canvas, self.num_words + 1)

    def sequences(self) -> Tensor:
        """All completions, ``[V**L, L]`` int64, the last position running fastest."""
        words = torch.arange(self.num_words, device=self.device)
        return torch.cartesian_prod(*[words] * self.length).view(-1, self.length)


class OracleDenoiser(TabularDenoiser):
    """The exact denoiser of a joint distribution: softmax of the logits = p(x_i | all unmasked tokens but the i-th).

    The logits are log-probabilities. Given tokens that have probability 0 together (parallel unmasking can write
    them), where nothing follows from the joint, it falls back on the marginal p(x_i).

    Args:
        joint: ``[V] * L``, probabilities of all sequences; 0 or more, need not sum to 1.
        device: where its table of conditionals lies.

    Raises:
        ValueError: negative, not finite or all-zero probabilities, unequal axes, or too large to tabulate.
    """

    def __init__(self, joint: Tensor, device: str | torch.device = "cpu"):
        joint = torch.as_tensor(joint).detach().to("cpu", torch.float64)
        shape = tuple(joint.shape)
        if not shape or len(set(shape)) != 1:
            raise ValueError(f"joint of shape {shape}: must have one axis of V words for each of L positions.")
        _check_size(shape[0], len(shape))
        if not joint.isfinite().all() or (joint < 0).any() or joint.sum() <= 0:
            raise ValueError("joint: probabilities must be finite, 0 or more, and not all of them 0.")
        self.joint = (joint / joint.sum()).to(device)
        super().__init__(_conditionals(self.joint).log(), device)
        self.model.requires_grad_(False)

    @classmethod
    def default(cls, device: str | torch.device = "cpu") -> OracleDenoiser:
        """The oracle of `dllm_gym.oracle_joint`, which the task "oracle" judges."""
        return cls(torch.from_numpy(mixture()), device)

    def probabilities(self) -> Tensor:
        """Probabilities of `sequences`, ``[V**L]`` float64."""
        return self.joint.flatten()


def _conditionals(joint: Tensor) -> Tensor:
    """``[(V + 1)**L, L, V]``: p(x_i | the other tokens of the canvas), the marginal p(x_i) where that is undefined."""
    words, length = joint.shape[0], joint.ndim
    total = joint  # of every canvas: the probability of what is unmasked; index V sums a position out
    for axis in range(length):
        total = torch.cat([total, total.sum(dim=axis, keepdim=True)], dim=axis)
    rows = []
    for i in range(length):
        together, alone = total.movedim(i, -1).split([words, 1], dim=-1)
        marginal = together[(words,) * (length - 1)]
        row = torch.where(alone > 0, together / alone, marginal)
        rows.append(row.unsqueeze(i).expand(*total.shape, words))  # whatever stands at position i itself
    return torch.stack(rows, dim=-2).reshape(-1, length, words)


def number(digits: Tensor, base: int) -> Tensor:
    """``[B, L]`` int64 digits, the leftmost counting most, as numbers ``[B]``."""
    return (digits * base ** torch.arange(digits.shape[1] - 1, -1, -1, device=digits.device)).sum(dim=1)


def _check_size(words: int, length: int) -> None:
    if not 2 <= words <= len(WORDS) or length < 1 or (words + 1) ** length * length * words > LARGEST_TABLE:
        raise ValueError(
            f"{words} words at {length} positions: must be 2 to {len(WORDS)} words at 1 position or more, and the "
            f"table of (words + 1)**length * length * words entries no larger than {LARGEST_TABLE}."
        )


def _word_tokenizer(num_words: int):
    """One token for each word: the words 0 to V - 1, the mask V, then what is never predicted."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"mask_token": "<mask>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    vocabulary = [*WORDS[:num_words], *special.values(), *PROMPT.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
