"""Other forms of action and observation around `UnmaskingEnv`, and the ids that combine them.

``MaskedDiffusion-{task}-{TopK,Threshold,Position}-v0`` show one flat Box and take the action of their name, for scripts
that know nothing but an id: CleanRL's, or ``PPO("MlpPolicy", id)``. ``gym.make_vec`` runs them in "sync" mode, one
forward a row; `dllm_gym.envs.vector` decodes all rows in one forward, but in the set form only.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.tasks.base import Task


def make_form(task: str | Task, form: str, *, max_unmask: int | None = None, **settings: Any) -> gym.Env:
    """`UnmaskingEnv` in another form of action, with the flat observation.

    Args:
        task, settings: as in `UnmaskingEnv`.
        form: "topk", "threshold" or "position".
        max_unmask: of `TopK`.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: must be one of {sorted(FORMS)}.")
    arguments = {} if max_unmask is None else {"max_unmask": max_unmask}
    return FlatObservation(FORMS[form](UnmaskingEnv(task, **settings), **arguments))


make_form.metadata = UnmaskingEnv.metadata  # where `gym.make` looks the render modes up


class _Form(gym.ActionWrapper, RecordConstructorArgs):
    """Turns an action of another form into the set of positions, ``[L]`` int8."""

    def __init__(self, env: gym.Env, **arguments: Any):
        RecordConstructorArgs.__init__(self, **arguments)
        gym.ActionWrapper.__init__(self, env)
        self.length = env.unwrapped.episodes.gen_length

    def _confidence(self) -> np.ndarray:
        """``[L]`` float32: confidence of the best token where eligible, -1 elsewhere."""
        seen = self.unwrapped.episodes.observation
        return seen.confidence[0, :, 0].masked_fill(~seen.eligible[0], -1.0).cpu().numpy()

    def _positions(self, chosen) -> np.ndarray:
        unmask = np.zeros(self.length, dtype=np.int8)
        unmask[chosen] = 1
        return unmask

    def _check(self, valid: bool, action: Any) -> None:
        if not valid:
            raise ValueError(f"action={action!r}: must be in {self.action_space}.")


class TopK(_Form):
    """Action ``Discrete(max_unmask)``: action a unmasks the a + 1 most confident eligible positions, all if fewer.

    Args:
        env: an `UnmaskingEnv`, wrapped or not.
        max_unmask: most positions a step, 1 to L; None: ``min(L, 8)``.
    """

    def __init__(self, env: gym.Env, max_unmask: int | None = None):
        super().__init__(env, max_unmask=max_unmask)
        most = min(self.length, 8) if max_unmask is None else max_unmask
        if not 1 <= most <= self.length:
            raise ValueError(f"max_unmask={max_unmask}: must be 1 to gen_length={self.length}.")
        self.action_space = spaces.Discrete(most)

    def action(self, action: int) -> np.ndarray:
        self._check(self.action_space.contains(action), action)
        return self._positions(np.argsort(-self._confidence(), kind="stable")[: int(action) + 1])


class Threshold(_Form):
    """Action ``Box(0, 1, (1,), float32)``: unmasks the eligible positions with more confidence, at least the best one.

    A number outside of [0, 1] acts as the nearer bound, so that an unclipped Gaussian policy works.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.action_space = spaces.Box(0.0, 1.0, (1,), np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        threshold = np.asarray(action, dtype=np.float32)
        self._check(threshold.shape == (1,) and not np.isnan(threshold[0]), action)
        confidence = self._confidence()
        unmask = self._positions(confidence > threshold)
        unmask[confidence.argmax()] = 1
        return unmask


class Position(_Form):
    """Action ``Discrete(L)``: unmasks that one position; one that is not eligible counts as an empty set.

    ``info["action_mask"]``, ``[L]`` int8, is 1 at the eligible positions, as ``action_space.sample(mask)`` takes it.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.action_space = spaces.Discrete(self.length)

    def action(self, action: int) -> np.ndarray:
        self._check(self.action_space.contains(action), action)
        return self._positions(int(action))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, info = super().reset(seed=seed, options=options)
        return observation, info | self._mask()

    def step(self, action: int):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, info | self._mask()

    def _mask(self) -> dict[str, np.ndarray]:
        return {"action_mask": self.unwrapped.episodes.observation.eligible[0].cpu().numpy().astype(np.int8)}


class FlatObservation(gym.ObservationWrapper, RecordConstructorArgs):
    """Observation ``Box((n,), float32)``: the Dict's entries one after the other, in alphabetical order of their keys.

    By default: confidence ``L * k``, eligible ``L``, masked ``L``, progress 1. Token ids become floats.
    """

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        flat = spaces.flatten_space(env.observation_space)
        self.observation_space = spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32))

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return spaces.flatten(self.env.observation_space, observation).astype(np.float32)


FORMS = {"topk": TopK, "threshold": Threshold, "position": Position}
