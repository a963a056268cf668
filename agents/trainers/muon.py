"""Muon, for the linear layers of a denoiser. AdamW trains what is left: embedding, head, norms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def linear_and_rest(
    model: nn.Module, weights: dict[str, nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Of the ``weights``, by their names in the model: the matrices of linear layers without the head, and the rest."""
    head = model.lm_head
    names = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    matrices = [p for name, p in weights.items() if name in names]
    return matrices, [p for name, p in weights.items() if name not in names]


def muon(matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon, whose updates have AdamW's size: a root mean square of 0.2 times the learning rate."""
    return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
