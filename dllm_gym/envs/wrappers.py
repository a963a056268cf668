"""Other forms of action and observation around the environments, and what the ids that combine them make.

``MaskedDiffusion-{task}-{TopK,Threshold,Position}-v0`` show one flat Box and take the action of their name, for scripts
that know nothing but an id: CleanRL's, or ``PPO("MlpPolicy", id)``. What an action means is written once, batch first;
the wrappers of the single environment and the vector environment both ask there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector.utils import batch_space
from torch import Tensor

from dllm_gym.decoding import best_n, with_best
from dllm_gym.envs.episodes import Episodes, TaskName
from dllm_gym.envs.spaces import flat, flat_space
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.names import find, refuse_unknown
from dllm_gym.tasks.base import Task
from dllm_gym.types import Observation


def make_form(task: TaskName | Task, form: str, **settings: Any) -> gym.Env:
    """`UnmaskingEnv` in another form of action, with the flat observation.

    Args:
        task: as in `UnmaskingEnv`.
        form: "topk", "threshold" or "position".
        settings: as in `UnmaskingEnv`, and those of the form: ``max_unmask`` of `TopK`.
    """
    kind, own = _form_and_arguments(form, settings, UnmaskingEnv)
    return FlatObservation(kind(UnmaskingEnv(task, **settings), **own))


make_form.metadata = UnmaskingEnv.metadata  # type: ignore[attr-defined]  # where `gym.make` looks the render modes up


def make_vector_form(task: TaskName | Task, num_envs: int = 1, *, form: str, **settings: Any) -> FormVectorEnv:
    """`FormVectorEnv` with the arguments of `make_form`, and of `UnmaskingVectorEnv`."""
    kind, own = _form_and_arguments(form, settings, UnmaskingVectorEnv)
    rows = PositionVectorEnv if kind is Position else FormVectorEnv
    return rows(task, num_envs, form=kind, arguments=own, **settings)


def _form_and_arguments(form: str, settings: dict[str, Any], env: Callable) -> tuple[type[_Form], dict[str, Any]]:
    """A form by name, and its own arguments, taken out of the settings of an environment."""
    kind = FORMS[find(form, FORMS, "form")]
    refuse_unknown(settings, kind.space, env)
    own = inspect.signature(kind.space).parameters.keys() & settings.keys()
    return kind, {name: settings.pop(name) for name in own}


class _Form(gym.ActionWrapper, RecordConstructorArgs):
    """Turns an action of another form into the set of positions."""

    def __init__(self, env: gym.Env, **arguments: Any):
        RecordConstructorArgs.__init__(self, **arguments)
        gym.ActionWrapper.__init__(self, env)
        self.action_space = self.space(_episodes(env).gen_length, **arguments)

    @staticmethod
    def space(length: int, /) -> spaces.Space:
        """The actions of one row."""
        raise NotImplementedError

    @staticmethod
    def valid(action: Any, space: spaces.Space) -> bool:
        """Whether it is an action of one row."""
        return space.contains(action)

    @staticmethod
    def positions(actions: Tensor, seen: Observation) -> Tensor:
        """The set that each row's action means, ``[B, L]`` bool, for actions ``[B, *space.shape]``."""
        raise NotImplementedError

    @classmethod
    def unmask(cls, actions: Sequence, space: spaces.Space, seen: Observation) -> Tensor:
        """`positions` for actions as a user gives them. Raises ValueError for one that is not in the space."""
        for action in actions:
            if not cls.valid(action, space):
                raise ValueError(f"action={action!r}: must be in {space}.")
        return cls.positions(torch.as_tensor(np.array(actions, space.dtype), device=seen.masked.device), seen)

    def action(self, action: Any) -> np.ndarray:
        seen = _episodes(self).observation
        return self.unmask([action], self.action_space, seen)[0].cpu().numpy().astype(np.int8)


class TopK(_Form):
    """Action ``Discrete(max_unmask)``: action a unmasks the a + 1 most confident eligible positions, all if fewer.

    Args:
        env: an `UnmaskingEnv`, wrapped or not.
        max_unmask: most positions per step, 1 to L; None: ``min(L, 8)``.
    """

    def __init__(self, env: gym.Env, max_unmask: int | None = None):
        super().__init__(env, max_unmask=max_unmask)

    @staticmethod
    def space(length: int, /, *, max_unmask: int | None = None) -> spaces.Discrete:
        most = min(length, 8) if max_unmask is None else max_unmask
        if not 1 <= most <= length:
            raise ValueError(f"max_unmask={max_unmask}: must be 1 to gen_length={length}.")
        return spaces.Discrete(most)

    @staticmethod
    def positions(actions: Tensor, seen: Observation) -> Tensor:
        return best_n(seen.confidence[..., 0], seen.eligible, actions[:, None] + 1)


class Threshold(_Form):
    """Action ``Box(0, 1, (1,), float32)``: unmasks the eligible positions with more confidence, at least the best one.

    A number outside of [0, 1] acts as the nearer bound, so that an unclipped Gaussian policy works.
    """

    @staticmethod
    def space(length: int, /) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (1,), np.float32)

    @staticmethod
    def valid(action: Any, space: spaces.Space) -> bool:
        threshold = np.asarray(action, dtype=np.float32)
        return threshold.shape == (1,) and not np.isnan(threshold[0])

    @staticmethod
    def positions(actions: Tensor, seen: Observation) -> Tensor:
        return with_best((seen.confidence[..., 0] > actions) & seen.eligible, seen)


class Position(_Form):
    """Action ``Discrete(L)``: unmasks that one position; one that is not eligible counts as an empty set.

    ``info["action_mask"]``, ``[L]`` int8, is 1 at the eligible positions, as ``action_space.sample(mask)`` takes it.
    ``action_masks()``, which sb3-contrib's MaskablePPO calls, is ``[L]`` bool; of many rows ``[num_envs, L]``.
    """

    @staticmethod
    def space(length: int, /) -> spaces.Discrete:
        return spaces.Discrete(length)

    @staticmethod
    def positions(actions: Tensor, seen: Observation) -> Tensor:
        return torch.zeros_like(seen.masked).scatter_(1, actions[:, None], True)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, info = super().reset(seed=seed, options=options)
        return observation, info | self._mask()

    def step(self, action: int):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, info | self._mask()

    def action_masks(self) -> np.ndarray:
        """``[L]`` bool: the eligible positions."""
        return _episodes(self).observation.eligible[0].cpu().numpy().copy()

    def _mask(self) -> dict[str, np.ndarray]:
        return {"action_mask": self.action_masks().astype(np.int8)}


def _episodes(env: gym.Env) -> Episodes:
    return cast(UnmaskingEnv, env.unwrapped).episodes


class FlatObservation(gym.ObservationWrapper, RecordConstructorArgs):
    """Observation ``Box((n,), float32)``: the Dict's entries one after the other, in alphabetical order of their keys.

    By default: confidence ``L * k``, eligible ``L``, masked ``L``, progress 1. Token ids become floats.
    """

    def __init__(self, env: gym.Env):
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = flat_space(env.observation_space)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        return flat({name: torch.as_tensor(array)[None] for name, array in observation.items()})[0].numpy()


class FormVectorEnv(UnmaskingVectorEnv):
    """Many rows of one of these ids, decoded together: `UnmaskingVectorEnv` with their actions and observation.

    ``gym.make_vec(id, num_envs=...)`` makes it. Actions are ``[num_envs]`` integers, ``[num_envs, 1]`` floats for
    `Threshold`; observations, also those in ``infos["final_obs"]``, are flat: ``[num_envs, n]`` float32. Row i of an
    environment seeded s behaves as the single environment of the id seeded s + i.

    Wrappers of single environments (``make_vec(wrappers=...)``, ``max_episode_steps``) need copies of the single one,
    a forward each: ``make_vec(..., vectorization_mode="sync")``.

    Args:
        task, num_envs, settings: as in `UnmaskingVectorEnv`.
        form: `TopK`, `Threshold` or `Position`.
        arguments: of the form.
    """

    def __init__(
        self, task: TaskName | Task, num_envs: int = 1, *, form: type[_Form], arguments: dict[str, Any], **settings: Any
    ):
        super().__init__(task, num_envs, **settings)
        self.form = form
        self.single_observation_space = flat_space(self.single_observation_space)
        self.single_action_space = form.space(self.episodes.gen_length, **arguments)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def step(self, actions):
        actions = actions.cpu().numpy() if isinstance(actions, Tensor) else actions
        shape, space = np.array(actions, dtype=object).shape, self.single_action_space
        if shape[:1] != (self.num_envs,):
            raise ValueError(f"actions of shape {shape}: must be num_envs={self.num_envs} of them, each in {space}.")
        return super().step(self.form.unmask(actions, space, self.episodes.observation))

    def _shown(self) -> Tensor:
        return flat(super()._shown())


class PositionVectorEnv(FormVectorEnv):
    """The rows of `Position`: ``infos["action_mask"]`` is ``[num_envs, L]`` int8."""

    def action_masks(self) -> np.ndarray:
        """``[num_envs, L]`` bool: the eligible positions of each row."""
        return self.episodes.observation.eligible.cpu().numpy().copy()

    def _details(self, unmasked: Tensor) -> dict[str, Tensor]:
        return super()._details(unmasked) | {"action_mask": self.episodes.observation.eligible.to(torch.int8)}


FORMS: dict[str, type[_Form]] = {"topk": TopK, "threshold": Threshold, "position": Position}
