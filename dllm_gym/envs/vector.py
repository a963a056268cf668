"""The native vector environment: one denoiser forward for all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate
from torch import Tensor

from dllm_gym.envs.episodes import Episodes, Finished, TaskName, require_rewards
from dllm_gym.envs.settings import EnvSettings, takes_settings
from dllm_gym.envs.spaces import action_to_unmask, observation_dict, observation_space
from dllm_gym.envs.trace import Trace
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.names import refuse_unknown
from dllm_gym.tasks.base import Task
from dllm_gym.types import Action


class UnmaskingVectorEnv(VectorEnv):
    """Many rows of `UnmaskingEnv`, decoded together: each step is one forward pass of the denoiser for all rows.

    Row i of an environment seeded s behaves as the single environment seeded s + i: the same problems, sets, tokens
    and rewards, confidences within the rounding of float32.

    Args:
        task, observe, settings: as in `UnmaskingEnv`.
        num_envs: number of rows.
        autoreset_mode: "SameStep" (default; the finished episode's observation and info are in
            ``infos["final_obs"]`` and ``infos["final_info"]``), "NextStep", or "Disabled" (reset rows with
            ``options={"reset_mask": ...}``; finished rows stay idle: their actions are ignored, they cost no forward
            pass, give reward 0 and stay terminated). TorchRL needs "Disabled": it cannot read infos that are texts.
        output: "numpy", or "torch" for tensors on the denoiser's device (observations, rewards, terminations).
        render_mode: None, "ansi" or "rgb_array"; `render` gives a tuple with one frame a row.

    ``reset(seed=, options=)``: a seed s seeds row i with s + i, a list gives each row its own. Options: ``problem``
    (an index, or one for each row), ``reset_mask`` (``[num_envs]`` bool: the rows to reset).
    """

    metadata = UnmaskingEnv.metadata | {"render_modes": ["ansi", "rgb_array"]}

    @takes_settings
    def __init__(
        self,
        task: TaskName | Task,
        num_envs: int = 1,
        *,
        observe: tuple[str, ...] = ("confidence",),
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        output: str = "numpy",
        render_mode: str | None = None,
        **settings: Any,
    ):
        if output not in ("numpy", "torch"):
            raise ValueError(f"output={output!r}: must be 'numpy' or 'torch'.")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode={render_mode!r}: must be None or one of {self.metadata['render_modes']}.")
        modes = {mode.value: mode for mode in AutoresetMode}
        if not isinstance(autoreset_mode, AutoresetMode) and autoreset_mode not in modes:
            raise ValueError(f"autoreset_mode={autoreset_mode!r}: must be one of {sorted(modes)}.")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}
        refuse_unknown(settings, UnmaskingVectorEnv)
        self.episodes = Episodes(task, num_envs, EnvSettings(**settings))
        self.num_envs = num_envs
        self.observe = tuple(observe)
        self.output = output
        self.render_mode = render_mode
        self.trace = Trace(self.episodes) if render_mode else None
        self.single_observation_space = observation_space(self.episodes, self.observe)
        self.single_action_space = spaces.MultiBinary(self.episodes.gen_length)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._started = False

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        options = options or {}
        rows = np.flatnonzero(self._reset_mask(options.get("reset_mask")))
        if not self._started and len(rows) < self.num_envs:
            raise ValueError("options['reset_mask'] in the first reset(): must be all True, or left out.")
        self._seed_rows(seed, rows)
        problem = options.get("problem")
        if problem is not None:
            problem = np.broadcast_to(np.asarray(problem), (self.num_envs,))[rows].tolist()
        self.episodes.begin(rows, problem)
        starting = np.isin(np.arange(self.num_envs), rows)
        self.episodes.observe(starting)
        if self.trace:
            self.trace.begin(rows)
        self._started = True
        unmasked = torch.zeros_like(self.episodes.canvas.masked)
        infos = self._step_infos(unmasked, starting) | self._start_infos(starting)
        return self._show(), infos

    def step(self, actions):
        if not self._started:
            raise RuntimeError("step() before reset(): call reset() first.")
        episodes = self.episodes
        shape = (self.num_envs, episodes.gen_length)
        unmask = action_to_unmask(actions, shape, episodes.device)
        waiting = ~episodes.active
        masked = episodes.canvas.masked
        finished = episodes.commit(Action.unmasking(unmask))
        require_rewards(finished)
        unmasked = masked & ~episodes.canvas.masked
        if self.trace:
            self.trace.step(finished)

        ended = np.zeros(self.num_envs, dtype=bool)
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        for end in finished:
            ended[end.row] = True
            rewards[end.row] = end.reward
        terminated = ended.copy()
        fresh = np.zeros(self.num_envs, dtype=bool)
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.DISABLED:
            terminated |= waiting
        elif self.autoreset_mode is AutoresetMode.NEXT_STEP:
            fresh = waiting
        else:
            fresh = ended
            infos = self._final_infos(finished, unmasked)
        rows = np.flatnonzero(fresh)
        if len(rows):
            episodes.begin(rows)
        episodes.observe()
        if self.trace and len(rows):
            self.trace.begin(rows)

        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            unmasked = unmasked & ~torch.as_tensor(fresh, device=unmasked.device)[:, None]
        infos |= self._step_infos(unmasked, np.ones(self.num_envs, dtype=bool)) | self._start_infos(fresh)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            for end in finished:  # beside the starts of other rows, which have a problem_id too
                infos = self._add_info(infos, end.info, end.row)
        truncated = np.zeros(self.num_envs, dtype=bool)
        if self.output == "torch":
            rewards = torch.as_tensor(rewards, dtype=torch.float32, device=episodes.device)
            terminated, truncated = (torch.as_tensor(x, device=episodes.device) for x in (terminated, truncated))
        return self._show(), rewards, terminated, truncated, infos

    def render(self):
        if self.render_mode is None:
            return None
        from dllm_gym import rendering

        draw = rendering.ansi if self.render_mode == "ansi" else rendering.rgb_array
        return tuple(draw(self.trace.frame(row)) for row in range(self.num_envs))

    def _reset_mask(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, dtype=bool)
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask']={mask!r}: must be a NumPy bool array of shape ({self.num_envs},), some True."
            )
        return mask

    def _seed_rows(self, seed: int | list[int | None] | None, rows: np.ndarray) -> None:
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: {len(seeds)} values for num_envs={self.num_envs}; must be one for each row.")
        for row in rows:
            if seeds[row] is not None or self.episodes.rngs[row] is None:
                self.episodes.rngs[row], _ = seeding.np_random(seeds[row])

    def _show(self) -> Any:
        """Observations nobody else will write to: NumPy copies, or the tensors themselves (never changed in place)."""
        shown = self._shown()
        return shown if self.output == "torch" else _to_numpy(shown)

    def _shown(self) -> Any:
        """The rows' observations, batch first: a dict of tensors, or one tensor."""
        return observation_dict(self.episodes.observation, self.observe)

    def _details(self, unmasked: Tensor) -> dict[str, Tensor]:
        """What the infos of every step say, batch first."""
        return {"unmasked": unmasked, "tokens": self.episodes.canvas.tokens, "probability": self.episodes.probability}

    def _step_infos(self, unmasked: Tensor, valid: np.ndarray) -> dict[str, Any]:
        return _with_masks(_to_numpy(self._details(unmasked)), valid)

    def _start_infos(self, rows: np.ndarray) -> dict[str, Any]:
        if not rows.any():
            return {}
        values = {
            "problem_id": np.full(self.num_envs, None, dtype=object),
            "prompt": np.full(self.num_envs, None, dtype=object),
            "dataset": np.full(self.num_envs, self.episodes.task.dataset, dtype=object),
        }
        for row in np.flatnonzero(rows):
            problem = self.episodes.problems[row]
            values["problem_id"][row], values["prompt"][row] = problem.id, problem.prompt
        return _with_masks(values, rows)

    def _final_infos(self, finished: list[Finished], unmasked: Tensor) -> dict[str, Any]:
        if not finished:
            return {}
        observations = tuple(iterate(self.observation_space, _to_numpy(self._shown())))
        details = _to_numpy(self._details(unmasked))
        infos: dict[str, Any] = {}
        for end in finished:
            info = end.info | {name: array[end.row] for name, array in details.items()}
            infos = self._add_info(infos, {"final_obs": observations[end.row], "final_info": info}, end.row)
        return infos


def _to_numpy(shown: Any) -> Any:
    if isinstance(shown, dict):
        return {name: _to_numpy(tensor) for name, tensor in shown.items()}
    return shown.cpu().numpy().copy()


def _with_masks(values: dict[str, np.ndarray], valid: np.ndarray) -> dict[str, np.ndarray]:
    """Gymnasium's form of vector infos: beside every key a mask of the rows for which it holds."""
    return values | {f"_{key}": valid.copy() for key in values}
