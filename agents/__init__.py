"""Agents: policies that choose what to unmask, and the trainers that learn them. Import as `dllm_gym.agents`."""

from __future__ import annotations

if __name__ != "dllm_gym.agents":
    raise ImportError(f"imported as {__name__!r}: the only way to import this folder is `dllm_gym.agents`.")

__all__ = ["collect", "decode", "evaluate", "load_policy", "make_policy"]

_HOMES = {
    "collect": "samplers.rollout",
    "decode": "samplers.decode",
    "evaluate": "evaluation",
    "load_policy": "samplers.policy",
    "make_policy": "samplers.heuristics",
}


def __getattr__(name: str):
    """The public names on first use: the command line's help must not wait for torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"dllm_gym.agents.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dllm_gym.agents' has no attribute {name!r}")
