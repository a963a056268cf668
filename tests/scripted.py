"""A denoiser that says exactly what a test tells it to, and a task to go with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dllm_gym.denoisers.base import Denoiser
from dllm_gym.tasks.base import Task
from dllm_gym.types import Problem, Verdict

VOCABULARY = ("a", "b", "c", "d", "<eos>", "<mask>", "<pad>")
A, B, C, D, EOS, MASK, PAD = range(len(VOCABULARY))


class ScriptedDenoiser(Denoiser):
    """Its probabilities are a table; `calls` lists the rows of every forward.

    Args:
        table: ``[L, V]`` probabilities, or a function from the canvas' tokens ``[B, L]`` to ``[B, L, V]``. Fewer than
            V columns are filled up with zeros: ``[L, 2]`` is a table over "a" and "b".
        length: L, for a function.
    """

    def __init__(self, table: Sequence | Tensor | Callable[[Tensor], Tensor], length: int | None = None):
        self.table = table if callable(table) else torch.as_tensor(table, dtype=torch.float32)
        self.length = length if callable(table) else len(self.table)
        self.tokenizer = word_tokenizer()
        self.mask_token_id, self.eos_token_id, self.eos_token_ids = MASK, EOS, frozenset({EOS})
        self.vocab_size = len(VOCABULARY)
        self.context_length = 64
        self.device = torch.device("cpu")
        self.calls: list[int] = []

    def logits(self, tokens: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        self.calls.append(len(tokens))
        canvas = tokens[:, -self.length :]
        table = torch.as_tensor(self.table(canvas)) if callable(self.table) else self.table
        table = table.float().expand(len(tokens), -1, -1)
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        logits[:, -self.length :] = -torch.inf
        logits[:, -self.length :, : table.shape[-1]] = table.log()
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, self.vocab_size))


class ScriptedTask(Task):
    """One problem for each answer; prompt i has i + 1 words. The score is the share of right words."""

    name, hub_id, columns = "scripted", None, "nothing"

    def __init__(self, answers: Sequence[str] = ("a b c d", "b c d a", "c d a b")):
        self.dataset, self.split = "scripted", "train"
        self.answers = [answer.split() for answer in answers]
        self.gen_length = len(self.answers[0])

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> Problem:
        return Problem(f"scripted/{index}", " ".join("a" * (index + 1)), self.answers[index])

    def verify(self, problem: Problem, completion: str) -> Verdict:
        words = completion.split()
        right = sum(word == wanted for word, wanted in zip(words, problem.answer, strict=False))
        return Verdict(words == problem.answer, right / len(problem.answer), completion)

    def read_row(self, row):
        raise NotImplementedError("it overrides what would call this")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of `VOCABULARY`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", mask_token="<mask>", pad_token="<pad>"
    )
