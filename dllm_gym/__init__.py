"""Reinforcement learning for masked diffusion language models. Importing registers the environments."""

from __future__ import annotations

from pathlib import Path as _Path

if __name__ != "dllm_gym":
    raise ImportError(
        f"dllm_gym was imported as {__name__!r}: put the folder that holds it on sys.path, not its parent."
    )

# In a bare checkout `agents/` and `eval/` lie beside this folder; this makes them dllm_gym.agents and dllm_gym.eval.
_root = _Path(__file__).parents[1]
if (_root / "setup.cfg").is_file() and (_root / "agents").is_dir():
    __path__.append(str(_root))

from dllm_gym.registration import register_all as _register_all  # noqa: E402

__version__ = "0.2.0"
__all__ = ["load_denoiser", "make_task"]

_register_all()


def __getattr__(name: str):
    """`load_denoiser` and `make_task` on first use: importing dllm_gym must not load torch models."""
    if name == "load_denoiser":
        from dllm_gym.denoisers.loading import load_denoiser

        return load_denoiser
    if name == "make_task":
        from dllm_gym.tasks import make_task

        return make_task
    raise AttributeError(f"module 'dllm_gym' has no attribute {name!r}")
