"""Decoding as pure functions: on a canvas, and on finished completions that are masked anew."""

from dllm_gym.decoding.canvas import (
    before,
    best_n,
    blank,
    blocks,
    commit,
    completions,
    eligible,
    log_likelihood,
    observe,
    pad_left,
    with_best,
)

__all__ = [
    "before",
    "best_n",
    "blank",
    "blocks",
    "commit",
    "completions",
    "eligible",
    "log_likelihood",
    "observe",
    "pad_left",
    "with_best",
]
