"""Metrics of each task of a mixture: ``accuracy/gsm8k``, ``reward/gsm8k``, ``nfe/gsm8k``; none for a single task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dllm_gym.tasks.mixture import task_of
from dllm_gym.types import Rollout

FIGURES = ("accuracy", "reward", "nfe")


def sums_by_task(rollout: Rollout, parts: Sequence[str]) -> dict[str, Any]:
    """What `means_by_task` needs of one process's episodes; those whose reward is no number are left out."""
    names = [task_of(problem.id) for problem in rollout.problems]
    finite = rollout.reward.isfinite().cpu()
    values = dict(zip(FIGURES, (rollout.correct.cpu(), rollout.reward.cpu(), rollout.nfe.cpu()), strict=True))
    sums: dict[str, float] = {}
    for part in parts:
        of = torch.tensor([name == part for name in names]) & finite
        sums |= {f"{figure}/{part}": float(value[of].sum()) for figure, value in values.items()}
        sums[f"episodes/{part}"] = float(of.sum())
    return sums


def means_by_task(sums: dict[str, float], parts: Sequence[str]) -> dict[str, float]:
    """The metrics, from sums over all processes; a task that had no episode has none."""
    present = [part for part in parts if sums[f"episodes/{part}"]]
    return {
        f"{figure}/{part}": sums[f"{figure}/{part}"] / sums[f"episodes/{part}"]
        for part in present
        for figure in FIGURES
    }
