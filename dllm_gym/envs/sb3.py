"""`UnmaskingVectorEnv` as a Stable-Baselines3 `VecEnv`: one denoiser forward for all rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.extras import needs

with needs("sb3"):
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import VecEnv
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn


def make_sb3_env(id: str, num_envs: int, seed: int | None = None, **kwargs: Any) -> SB3VecEnv:
    """The environment of an id, all rows in one forward.

    A set of positions wants `UnmaskingActorCriticPolicy`: SB3's own Bernoulli (``PPO("MultiInputPolicy", env)``) draws
    bits for positions that are not eligible too, whose noise drowns the ratio. The other forms want
    ``PPO("MlpPolicy", env)``, or sb3-contrib's ``MaskablePPO("MlpPolicy", env)`` for ``...-Position-v0``.

    Args:
        id: of an environment, for example "MaskedDiffusion-GSM8K-v0" or "MaskedDiffusion-GSM8K-TopK-v0".
        num_envs: rows.
        seed: row i is seeded with seed + i at its first reset.
        kwargs: arguments of `UnmaskingEnv`, and of the form.

    Raises:
        TypeError, ValueError: an argument that there is not, or one out of range, as from `UnmaskingEnv`.
        gymnasium.error.Error: an id that is not registered.
    """
    env = SB3VecEnv(cast(UnmaskingVectorEnv, gym.make_vec(id, num_envs=num_envs, **kwargs)))
    if seed is not None:
        env.seed(seed)
    return env


class SB3VecEnv(VecEnv):
    """Rows of `UnmaskingEnv` for SB3: Dict observations ``[num_envs, ...]``, MultiBinary actions ``[num_envs, L]``.

    Those of a form have flat observations ``[num_envs, n]`` and its actions, see `dllm_gym.envs.wrappers`.

    Where a row's episode ends, ``infos[row]`` has ``terminal_observation``, ``episode`` (``{"r", "l", "t"}``, so that
    SB3's logs fill without a VecMonitor) and the end's ``completion``, ``score``, ``correct``, ``nfe``, ``problem_id``
    and ``step_limit``. ``TimeLimit.truncated`` is always False: the step limit is part of the process.

    The rows are one environment: `get_attr`, `set_attr` and `env_method` address all of them at once, but for
    ``env_method("action_masks")`` of `Position`, which gives each row its own.
    """

    def __init__(self, env: UnmaskingVectorEnv):
        if not isinstance(env, UnmaskingVectorEnv):
            raise TypeError(f"env={env}: must be an UnmaskingVectorEnv; for others see SB3's make_vec_env.")
        if env.autoreset_mode is not AutoresetMode.SAME_STEP or env.output != "numpy":
            raise ValueError(
                f"env with autoreset_mode={env.autoreset_mode.value!r} and output={env.output!r}: "
                f"must be {AutoresetMode.SAME_STEP.value!r} and 'numpy'."
            )
        self.env = env
        self._started = time.time()
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = env.metadata

    def reset(self) -> VecEnvObs:
        problems = [options.get("problem") for options in self._options]
        observation, infos = self.env.reset(seed=self._seeds, options={"problem": problems})
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_row(infos, row) for row in range(self.num_envs)]
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        observation, rewards, terminated, _, infos = self.env.step(self._actions)
        rows = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        for row in np.flatnonzero(terminated).tolist():
            end = _row(infos["final_info"], row)
            # The reward comes with the last step, and every step is one forward.
            episode = {"r": float(rewards[row]), "l": end["nfe"], "t": round(time.time() - self._started, 6)}
            rows[row] |= end | {"episode": episode, "terminal_observation": infos["final_obs"][row]}
            self.reset_infos[row] = _row(infos, row)
        return observation, rewards.astype(np.float32), terminated, rows

    def get_images(self) -> Sequence[np.ndarray | None]:
        return self.env.render() if self.render_mode == "rgb_array" else [None] * self.num_envs

    def render(self, mode: str | None = None) -> Any:
        """One picture of all rows, or their texts one after the other."""
        if self.render_mode == "ansi" and mode in (None, "ansi"):
            return "\n\n".join(self.env.render())
        return super().render(mode)

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args, indices: VecEnvIndices = None, **method_kwargs) -> list[Any]:
        result = getattr(self.env, method_name)(*method_args, **method_kwargs)
        return [result[row] if method_name == "action_masks" else result for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """True for `Monitor`, whose part ``infos[row]["episode"]`` plays: SB3's evaluation then asks for no other."""
        return [wrapper_class is Monitor] * len(list(self._get_indices(indices)))


def _row(infos: dict[str, Any], row: int) -> dict[str, Any]:
    """What Gymnasium's vector infos say of one row, in plain Python where it is a number."""
    return {
        key: value.item() if isinstance(value := values[row], np.generic) else value
        for key, values in infos.items()
        if not key.startswith(("_", "final_")) and infos[f"_{key}"][row]
    }
