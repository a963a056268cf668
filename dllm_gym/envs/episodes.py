"""Rows of running episodes: what the single and the vector environment both are, and what our own trainers drive.

`Episodes` holds the state: problems, generators, and a decoding session with the canvases. One round is ``observe() ->
commit(action)``; ``begin(rows)`` puts new problems into rows that are free.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.denoisers.session import DecodingSession
from dllm_gym.envs.settings import EnvSettings
from dllm_gym.rewards import get_reward
from dllm_gym.tasks import make_task
from dllm_gym.tasks.base import Task
from dllm_gym.transfer import onto
from dllm_gym.types import Action, Canvas, Indices, Observation, Problem

TaskName = str | Sequence[str] | Mapping[str, int]
"""One task, or a mixture of several."""


@dataclass
class Finished:
    """The end of one episode."""

    row: int
    reward: float
    info: dict[str, Any]
    """``completion, score, correct, undecided, nfe, positions, length, log_likelihood, problem_id, step_limit``.

    ``positions`` is the number of token positions forwarded, which is what a step costs where keys and values are kept.
    Undecided is `dllm_gym.types.Verdict.undecided`: None, or why there was no verdict; it counts as wrong.
    """


def require_rewards(finished: Iterable[Finished]) -> None:
    """Raise FloatingPointError, which names the problem, where a reward or score is no number."""
    for end in finished:
        if not (math.isfinite(end.reward) and math.isfinite(end.info["score"])):
            raise FloatingPointError(
                f"problem {end.info['problem_id']!r}: reward {end.reward} for score {end.info['score']}; verifiers and "
                f"rewards must give finite numbers."
            )


class Episodes:
    """A fixed number of rows, each an episode of its own with its own generator.

    Args:
        task: the name of a task, several as `dllm_gym.make_task` takes them, or a `Task`.
        num_rows: at least 1.
        settings: see `EnvSettings`.
    """

    def __init__(self, task: TaskName | Task, num_rows: int, settings: EnvSettings):
        if num_rows < 1:
            raise ValueError(f"num_envs={num_rows}: must be 1 or more.")
        given = settings.denoiser
        self.denoiser = given if isinstance(given, Denoiser) else load_denoiser(given, **settings.loading)
        self.device = self.denoiser.device
        self.task = _make_task(task, settings, self.denoiser)
        settings = settings.resolved(self.task, self.denoiser)
        self.num_rows = num_rows
        self.gen_length = cast(int, settings.gen_length)
        self.block_length = cast(int, settings.block_length)
        self.max_steps = cast(int, settings.max_steps)
        self.sampling = settings.sampling
        self.confidence_k = settings.confidence_k
        self.reward = get_reward(settings.reward)
        self.alpha = settings.alpha
        self.empty_action = settings.empty_action
        self.cache = settings.cache
        nothing = [torch.zeros(0, dtype=torch.int64, device=self.device)] * num_rows
        self.session = DecodingSession.blank(
            self.denoiser,
            nothing,
            self.gen_length,
            self.block_length,
            stop_at_eos=settings.stop_at_eos,
            cache=settings.cache,
        )
        self.problems: list[Any] = [None] * num_rows
        """A `Problem` in every row that has begun."""
        self.rngs: list[Any] = [None] * num_rows
        """A NumPy generator in every row that has begun."""
        self.clear()
        self.encode_prompt(self.task[0])

    def clear(self) -> None:
        """End all episodes, unfinished ones without a result."""
        self.active = np.zeros(self.num_rows, dtype=bool)
        self.session.clear()
        self.observation = self._empty_observation()

    @property
    def canvas(self) -> Canvas:
        """The rows as they stand."""
        return self.session.canvas

    @property
    def end_tokens(self) -> Tensor:
        """``[E]`` int64: the tokens that end a completion."""
        return self.session.end_tokens

    @property
    def probability(self) -> Tensor:
        """``[num_rows, L]`` float32: the denoiser's probability of the token it would write, 0 where it writes none."""
        return torch.where(self.observation.masked, self.observation.probability, 0.0)

    def begin(self, rows: Indices, problems: Sequence[int | None] | None = None) -> None:
        """Put problems into rows: by index, or drawn by the row's generator where None."""
        for i, row in enumerate(rows):
            index = None if problems is None else problems[i]
            index = int(self.rngs[row].integers(len(self.task))) if index is None else operator.index(index)
            self.problems[row] = self.task[index]
        self.session.begin(rows, [self.encode_prompt(self.problems[row]) for row in rows])
        self.active[np.asarray(rows)] = True

    def observe(self, rows: np.ndarray | None = None, check: bool = True) -> Observation:
        """One denoiser forward for the running rows; the observation of all rows, zeros where none runs.

        Args:
            rows: ``[num_rows]`` bool, the rows to predict; None: all that run. The others keep their observation.
            check: wait for the device, and see whether all is finite. If False, `commit` does.
        """
        rows = self.active if rows is None else rows & self.active
        if not rows.any():
            return self.observation
        whole = bool(rows.all())
        index: slice | Tensor = slice(None) if whole else torch.as_tensor(np.flatnonzero(rows))
        uniforms = None
        if self.sampling.temperature > 0:
            drawn = [self.rngs[row].random(self.gen_length, dtype=np.float32) for row in np.flatnonzero(rows)]
            (uniforms,) = onto(self.device, torch.as_tensor(np.stack(drawn)))
        seen, _ = self.session.observe(index, self.confidence_k, self.sampling, uniforms, check)
        if isinstance(index, slice):
            self.observation = seen
        else:
            self.observation = self.observation.put(onto(self.device, index)[0], seen)
        return self.observation

    def commit(self, action: Action) -> list[Finished]:
        """Act on all rows, of which only the running ones change, and end the episodes that are complete."""
        if self.empty_action == "best":
            action = Action(decoding.with_best(action.unmask, self.observation), action.remask)
        self.session.commit(self.observation, action)
        outline = self.session.outline
        done = ~outline.masked.any(dim=1).numpy()
        rows = np.flatnonzero((done | (outline.steps >= self.max_steps).numpy()) & self.active)
        return self._finish(rows, limited=~done) if len(rows) else []

    def encode_prompt(self, problem: Problem) -> Tensor:
        """The prompt's tokens, 1-D int64, through the chat template where the tokenizer has one."""
        tokens = self._tokenize(problem) if problem.tokens is None else problem.tokens.tolist()
        known, largest = self.denoiser.prompt_tokens, max(tokens, default=0)
        if known is not None and not 0 <= min(tokens, default=0) <= largest < known:
            shown = f" ({self.denoiser.tokenizer.decode([largest])!r})" if problem.tokens is None else ""
            raise ValueError(
                f"problem {problem.id!r}: its token {largest}{shown} is beyond the {known} tokens of "
                f"{self.denoiser.name}: the tokenizer is not that of the weights."
            )
        if len(tokens) + self.gen_length > self.denoiser.context_length:
            raise ValueError(
                f"problem {problem.id!r}: {len(tokens)} prompt tokens and gen_length={self.gen_length} exceed the "
                f"denoiser's context of {self.denoiser.context_length} tokens; give a smaller gen_length."
            )
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)

    def _tokenize(self, problem: Problem) -> list[int]:
        tokenizer, text = self.denoiser.tokenizer, problem.prompt
        if tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            try:
                text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # of whatever the template says
                raise ValueError(
                    f"{self.denoiser.name}: the chat template of its tokenizer fails on problem {problem.id!r} "
                    f"({type(error).__name__}: {error})."
                ) from error
        tokens = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
            words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            lacking = sorted({word for word in words if tokenizer.unk_token_id in tokenizer(word)["input_ids"]})
            raise ValueError(
                f"problem {problem.id!r}: the denoiser's tokenizer lacks {len(lacking)} of its words "
                f"({', '.join(map(repr, lacking[:8]))}{', ...' if len(lacking) > 8 else ''}). "
                f"The embedded denoiser reads embedded problems only: dataset='embedded'."
            )
        return tokens

    def judge(
        self,
        row: int,
        problem: Problem,
        text: Tensor,
        *,
        nfe: int,
        positions: int,
        log_likelihood: float,
        step_limit: bool = False,
    ) -> Finished:
        """The end of an episode that wrote ``text``, the tokens before its end: verdict and reward."""
        completion, verdict = "", None
        if not step_limit:
            completion = self.denoiser.tokenizer.decode(text, skip_special_tokens=True)
            verdict = self.task.verify(problem, completion)
        score = verdict.score if verdict else 0.0
        info = {
            "completion": completion,
            "score": score,
            "correct": bool(verdict and verdict.correct),
            "undecided": verdict.undecided if verdict else None,
            "nfe": nfe,
            "positions": positions,
            "length": min(len(text) + 1, self.gen_length),
            "log_likelihood": log_likelihood,
            "problem_id": problem.id,
            "step_limit": step_limit,
        }
        reward = self.reward(score, nfe, self.gen_length, self.alpha)
        return Finished(row, float("nan" if reward is None else reward), info)

    def _finish(self, rows: np.ndarray, limited: np.ndarray) -> list[Finished]:
        known = torch.as_tensor(rows)
        (index,) = onto(self.device, known)
        ended = self.canvas[index]
        texts = decoding.completions(ended, self.end_tokens)
        figures = {
            "nfe": self.session.outline.steps[known].tolist(),
            "positions": self.session.positions[known].tolist(),
            "log_likelihood": decoding.log_likelihood(ended).tolist(),
        }
        finished = []
        for i, (row, text) in enumerate(zip(rows.tolist(), texts, strict=True)):
            own = {name: values[i] for name, values in figures.items()}
            finished.append(self.judge(row, self.problems[row], text, **own, step_limit=bool(limited[row])))
        self.active[rows] = False
        self.observation = self.observation.put(index, self._empty_observation(ended))
        return finished

    def _empty_observation(self, canvas: Canvas | None = None) -> Observation:
        """What is seen of canvases that are not predicted: tokens and progress; nothing may be chosen any more."""
        canvas = self.canvas if canvas is None else canvas
        zeros = torch.zeros(canvas.tokens.shape, device=self.device)
        return Observation(
            confidence=zeros[..., None].expand(-1, -1, self.confidence_k).clone(),
            entropy=zeros,
            token=canvas.tokens,
            masked=canvas.masked,
            eligible=torch.zeros_like(canvas.masked),
            progress=canvas.steps / self.gen_length,
            probability=canvas.probability,
        )


def _make_task(task: TaskName | Task, settings: EnvSettings, denoiser: Denoiser) -> Task:
    """The task by name, on the problems that the settings say. Raises ValueError for a `Task` that has its own."""
    if not isinstance(task, Task):
        return make_task(
            task,
            settings.dataset or denoiser.default_dataset,
            settings.split,
            prompt_template=settings.prompt_template,
            few_shot=settings.few_shot,
            allow_code_execution=settings.allow_code_execution,
        )
    if settings.dataset not in (None, task.dataset):
        raise ValueError(f"dataset={settings.dataset!r}: the Task given has its own, {task.dataset!r}.")
    for name in ("prompt_template", "few_shot"):
        if value := getattr(settings, name):
            raise ValueError(f"{name}={value!r}: the Task given writes its own prompts, give it to the Task.")
    return task
