"""Sentences of the oracle's joint distribution: one prompt, a few right completions, all of them known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dllm_gym.oracle_joint import PROMPT, SENTENCES
from dllm_gym.tasks.base import EMBEDDED, GeneratedTask
from dllm_gym.types import Problem, Verdict


class Oracle(GeneratedTask):
    """``Problem.answer``: the right sentences; a completion is right if it is one of them, whatever its weight.

    All problems are the same but for their ids: a distribution over completions is what there is to get right, and a
    verdict cannot see that. Sequences that only the smoothing of the joint makes possible are wrong.

    Args:
        dataset: None or "embedded".
        split: "train" or "test", different in their ids only.
        sentences: the right ones, with weights; all of one length.
    """

    name = "oracle"
    fills_canvas = True

    def __init__(
        self,
        dataset: str | None = None,
        split: str = "train",
        *,
        sentences: Mapping[str, float] = SENTENCES,
        **options,
    ):
        if dataset not in (None, EMBEDDED):
            raise ValueError(f"dataset={dataset!r}: the oracle's problems are its own; leave it out or 'embedded'.")
        super().__init__(dataset, split, **options)
        self.sentences = dict(sentences)
        self.gen_length = len(next(iter(self.sentences)).split())

    def generate(self, rng: np.random.Generator) -> tuple[str, tuple[str, ...], int]:
        return PROMPT, tuple(self.sentences), int(rng.integers(2**32))  # a number, so that both splits fill up

    def demonstrate(self, content: int, rng: np.random.Generator) -> str:
        weights = np.array(list(self.sentences.values()))
        return str(rng.choice(list(self.sentences), p=weights / weights.sum()))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Score: 1 for a right sentence, else 0."""
        sentence = " ".join(completion.split())
        correct = sentence in problem.answer
        return Verdict(correct, float(correct), sentence or None)
