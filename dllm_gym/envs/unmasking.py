"""The single environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from dllm_gym.envs.episodes import Episodes, TaskName, require_rewards
from dllm_gym.envs.settings import EnvSettings, takes_settings
from dllm_gym.envs.spaces import action_to_unmask, observation_dict, observation_space
from dllm_gym.envs.trace import Trace
from dllm_gym.names import refuse_unknown
from dllm_gym.tasks.base import Task
from dllm_gym.types import Action


class UnmaskingEnv(gym.Env):
    """Decoding with a masked diffusion language model, as a Markov decision process.

    ## Description

    A frozen masked diffusion language model, the *denoiser*, completes a prompt. The completion starts as L mask
    tokens. At each step, the denoiser predicts a token for every masked position, the agent chooses a SET of positions,
    and the predicted tokens are written there. The episode ends when nothing is masked. A verifier then reads the text,
    and the reward pays for a right answer in few steps. If many positions are unmasked at once, tokens that were
    predicted independently may contradict each other; if they are unmasked one by one, decoding is slow. This is the
    problem of "learned unmasking policies" (arXiv 2512.09106).

    ## Action Space

    `MultiBinary(L)`: 1 at the positions to unmask. Positions that are not eligible are ignored.

    ## Observation Space

    A `Dict` of per-position signals and the time:

    | key | space | meaning |
    | --- | --- | --- |
    | `confidence` | `Box(0, 1, (L, k), float32)` | the denoiser's k highest probabilities, 0 where already unmasked |
    | `entropy` | `Box(0, ceil(log V), (L,), float32)` | entropy in nats, 0 where already unmasked; only if observed |
    | `token` | `Box(0, V - 1, (L,), int64)` | the token that would be, or was, written; only if observed |
    | `probability` | `Box(0, 1, (L,), float32)` | of that token, when it is or was written; only if observed |
    | `masked` | `MultiBinary(L)` | not yet unmasked |
    | `eligible` | `MultiBinary(L)` | masked and inside the active block: the positions that count as action |
    | `progress` | `Box(0, 1, (1,), float32)` | steps so far / L |

    ## Rewards

    0 until the end. Then, with r the verifier's score and NFE the number of denoiser forward passes:
    `r * ((L - min(NFE, L) + 1) / L) ** alpha` ("multiplicative"), or `r - alpha * NFE / L` ("additive").

    ## Starting State

    The environment's generator draws a problem from the task; `reset(options={"problem": index})` chooses one. The
    whole completion is masked.

    ## Episode End

    `terminated` is set when nothing is masked. It is also set after `max_steps` steps, with score 0 and
    `info["step_limit"]`: the limit is part of the process. A truncation would make an agent bootstrap a value there,
    which rewards stalling. `truncated` is never set.

    ## Information

    Every step: `unmasked` (`[L]` bool, the positions written, those filled after the end of the text among them),
    `tokens` (`[L]` int64, the canvas), `probability` (`[L]` float32, the denoiser's probability of the token it would
    write; differs from the confidence when temperature > 0). `reset` gives `problem_id`, `prompt` and `dataset`.
    At the end: `completion` (text), `score`, `correct`, `undecided` (None, or why there was no verdict), `nfe`,
    `positions` (token positions forwarded, see docs/caches.md),
    `length` (tokens up to the end of the text, its end token included), `log_likelihood` (nats: the untempered
    log-probability of every token at the step that wrote it, summed), `problem_id`, `step_limit`.

    ## Arguments

    `task`: the name of a task, "gsm8k" for example; several, as in `{"gsm8k": 2, "countdown": 1}`; or a `Task`; set by
    the id. `observe`: per-position signals in the observation, of those above. `render_mode`: "ansi", "rgb_array" or
    "human", which prints ansi. All others are the fields of `dllm_gym.envs.settings.EnvSettings`.

    Raises:
        TypeError: an unknown argument; the message suggests the nearest one.
        ValueError: an argument out of range; the message names its value and what is allowed. An action of the wrong
            shape or dtype. A problem that the denoiser cannot read, or that does not fit into its context.
        FloatingPointError: the denoiser's logits, a score or a reward are not finite.
    """

    metadata = {"render_modes": ["ansi", "rgb_array", "human"], "render_fps": 2}

    @takes_settings
    def __init__(
        self,
        task: TaskName | Task,
        *,
        observe: tuple[str, ...] = ("confidence",),
        render_mode: str | None = None,
        **settings: Any,
    ):
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode={render_mode!r}: must be None or one of {self.metadata['render_modes']}.")
        refuse_unknown(settings, UnmaskingEnv)
        self.episodes = Episodes(task, 1, EnvSettings(**settings))
        self.observe = tuple(observe)
        self.render_mode = render_mode
        self.observation_space = observation_space(self.episodes, self.observe)
        self.action_space = spaces.MultiBinary(self.episodes.gen_length)
        self.trace = Trace(self.episodes) if render_mode else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.episodes.rngs[0] = self.np_random
        self.episodes.begin([0], [(options or {}).get("problem")])
        observation = self.episodes.observe()
        if self.trace:
            self.trace.begin([0])
        if self.render_mode == "human":
            self.render()
        problem = self.episodes.problems[0]
        info = {"problem_id": problem.id, "prompt": problem.prompt, "dataset": self.episodes.task.dataset}
        return self._numpy(observation), info | self._step_info(np.zeros(self.episodes.gen_length, dtype=bool))

    def step(self, action):
        if not self.episodes.active[0]:
            raise gym.error.ResetNeeded("step() after the end of an episode: call reset() first.")
        unmask = action_to_unmask(action, (self.episodes.gen_length,), self.episodes.device)
        masked = self.episodes.canvas.masked
        finished = self.episodes.commit(Action.unmasking(unmask[None]))
        require_rewards(finished)
        unmasked = (masked & ~self.episodes.canvas.masked)[0].cpu().numpy()
        if self.trace:
            self.trace.step(finished)
        observation = self._numpy(self.episodes.observe())
        info = self._step_info(unmasked)
        reward = 0.0
        if finished:
            reward, info = finished[0].reward, info | finished[0].info
        if self.render_mode == "human":
            self.render()
        return observation, reward, bool(finished), False, info

    def render(self):
        if self.render_mode is None:
            gym.logger.warn('render() without a render_mode: make the environment with render_mode="rgb_array".')
            return None
        from dllm_gym import rendering

        frame = self.trace.frame(0)
        if self.render_mode == "rgb_array":
            return rendering.rgb_array(frame)
        text = rendering.ansi(frame)
        return print(text) if self.render_mode == "human" else text

    def _numpy(self, observation) -> dict[str, np.ndarray]:
        return {k: v[0].cpu().numpy().copy() for k, v in observation_dict(observation, self.observe).items()}

    def _step_info(self, unmasked: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "unmasked": unmasked,
            "tokens": self.episodes.canvas.tokens[0].cpu().numpy().copy(),
            "probability": self.episodes.probability[0].cpu().numpy().copy(),
        }
