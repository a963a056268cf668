"""Evaluation and benchmarks. Import as `dllm_gym.eval`."""

from __future__ import annotations

if __name__ != "dllm_gym.eval":
    raise ImportError(f"imported as {__name__!r}: the only way to import this folder is `dllm_gym.eval`.")
