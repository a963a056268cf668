"""Agents that learn the denoiser: one objective, one file; what they share is in `trainer` and `learner`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_gym.agents.trainers.denoiser.objective import Loss, TrainerConfig

OBJECTIVES = {
    "spg": ("spg", "SPGConfig", "spg_loss"),
    "gdsd": ("gdsd", "GDSDConfig", "gdsd_loss"),
    "gdsd-tlc": ("gdsd", "GDSDTLCConfig", "gdsd_loss"),
    "espo": ("espo", "ESPOConfig", "espo_loss"),
    "diffu-grpo": ("diffu_grpo", "DiffuGRPOConfig", "diffu_grpo_loss"),
    "unigrpo": ("unigrpo", "UniGRPOConfig", "unigrpo_loss"),
    "coupled-grpo": ("coupled_grpo", "CoupledGRPOConfig", "coupled_grpo_loss"),
    "wd1": ("wd1", "WD1Config", "wd1_loss"),
    "trace-pg": ("trace", "TracePGConfig", "trace_pg_loss"),
    "trace-grpo": ("trace", "TraceGRPOConfig", "trace_grpo_loss"),
    "elbo-pg": ("elbo_pg", "ELBOPGConfig", "elbo_pg_loss"),
}
"""Name -> module of this folder, its config, its loss."""


def load_objective(name: str) -> tuple[type[TrainerConfig], Loss]:
    """Config and loss of an objective. Raises ValueError for an unknown name."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r}: must be one of {', '.join(OBJECTIVES)}.")
    module_name, config, loss = OBJECTIVES[name]
    module = import_module(f"dllm_gym.agents.trainers.denoiser.{module_name}")
    return getattr(module, config), getattr(module, loss)
