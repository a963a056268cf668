"""Environments as configs name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import gymnasium as gym

from dllm_gym.agents.workers import worker_count
from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.envs.settings import EnvSettings
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.extras import needs
from dllm_gym.names import find

with needs("train"):
    from tyro.conf import Suppress

MIXTURE = "MaskedDiffusion-Mixture-v0"


@dataclass
class EnvConfig(EnvSettings):
    """The environment: `EnvSettings`, an id and a number of rows."""

    id: str = "MaskedDiffusion-GSM8K-v0"
    """Registered id of an environment whose action is a set of positions."""
    num_envs: int = field(default=128, kw_only=True)
    """Number of rows decoded together."""
    denoiser: str | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    """"embedded", "embedded-early", a hub id or a folder; None takes the id's own: "embedded", or the oracle."""
    split: Suppress[str] = field(default="train", kw_only=True)
    """"train" or "test". Trainers and evaluations set it."""
    mix: str | None = field(default=None, kw_only=True)
    """Tasks of MaskedDiffusion-Mixture-v0 and their weights, "gsm8k:2,countdown:1"; None takes both alike."""
    reward: str = field(default="multiplicative", kw_only=True)
    """"multiplicative" or "additive"."""

    @property
    def denoiser_name(self) -> str:
        """The denoiser that is used."""
        return self.denoiser or env_spec(self.id).kwargs.get("denoiser", "embedded")


def make_env(config: EnvConfig, split: str | None = None, **changes) -> UnmaskingVectorEnv:
    """The vector environment of a config, on its split or another; its denoiser may be an object instead of a name.

    Raises:
        ValueError: an id that is not registered, or not one whose action is a set of positions.
    """
    changes = ({"split": split} if split else {}) | changes
    env_id, settings = gym_arguments(config)
    return cast(UnmaskingVectorEnv, gym.make_vec(env_id, **settings | changes))


def gym_arguments(config: EnvConfig) -> tuple[str, dict[str, Any]]:
    """The id of a config and the arguments of ``gym.make_vec``. Raises ValueError as `make_env`."""
    settings = vars(config) | {"denoiser": config.denoiser_name}
    env_id, mix = env_spec(settings.pop("id")).id, settings.pop("mix")
    if mix is not None:
        if env_id != MIXTURE:
            raise ValueError(f"env.mix={mix!r}: is for --env.id {MIXTURE}, not for {env_id}.")
        settings["task"] = mix
    return env_id, settings


def make_envs(config: EnvConfig, split: str | None = None, **changes) -> list[UnmaskingVectorEnv]:
    """`make_env`, its rows dealt out to environments that play side by side, one for each of torch's threads on a CPU.

    They share denoiser and task.
    """
    loading = config.loading | {"device": changes.pop("device", config.device)}
    denoiser = changes.pop("denoiser", None) or load_denoiser(config.denoiser_name, **loading)
    count = min(worker_count(denoiser.device), config.num_envs)
    changes |= {"denoiser": denoiser, "num_envs": -(-config.num_envs // count)}
    first = make_env(config, split, **changes).unwrapped
    changes |= {"task": first.episodes.task, "dataset": None, "prompt_template": None, "few_shot": 0}
    return [first, *(make_env(config, split, **changes).unwrapped for _ in range(count - 1))]


def env_spec(env_id: str):
    """Gymnasium's spec of an id, in any case, whose action is a set of positions. Raises ValueError: no such id."""
    import dllm_gym  # noqa: F401  (registers the ids)

    ours = {i: s for i, s in gym.registry.items() if i.startswith("MaskedDiffusion-") and s.vector_entry_point}
    known = {i: s for i, s in ours.items() if "form" not in s.kwargs}
    return known[find(env_id, known, "env.id", ", whose action is a set of positions")]
