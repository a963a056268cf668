"""The past of each row, for rendering: what was done to each position, and how sure the denoiser was."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np

from dllm_gym.envs.episodes import Episodes, Finished
from dllm_gym.rendering import Frame
from dllm_gym.types import Indices


@dataclass(frozen=True)
class Event:
    """One position of one row was written (or filled in), or taken back."""

    step: int
    """From 1."""
    position: int
    written: bool
    """False: it was taken back."""
    confidence: float
    """The denoiser's highest probability there when it was last predicted."""


class Trace:
    """Follows the rows of `Episodes`: call `begin` after rows were reset and observed, `step` after each commit.

    Attributes:
        events: for each row, what was done to it so far, in order.
    """

    def __init__(self, episodes: Episodes):
        self.episodes = episodes
        self.events: list[list[Event]] = [[] for _ in range(episodes.num_rows)]
        self.notes = [""] * episodes.num_rows
        self._look()

    def begin(self, rows: Indices) -> None:
        for row in rows:
            self.events[row] = []
            self.notes[row] = ""
        self._look()

    def step(self, finished: list[Finished]) -> None:
        masked, steps = self.episodes.canvas.masked.cpu().numpy(), self.episodes.canvas.steps.tolist()
        for row, position in np.argwhere(masked != self._masked).tolist():
            written, confidence = bool(self._masked[row, position]), float(self._confidence[row, position])
            self.events[row].append(Event(steps[row], position, written, confidence))
        for end in finished:
            self.notes[end.row] = f"{'right' if end.info['correct'] else 'wrong'}, reward {end.reward:.2f}"
        self._look()

    def _look(self) -> None:
        self._masked = self.episodes.canvas.masked.cpu().numpy()
        self._confidence = self.episodes.observation.confidence[..., 0].cpu().numpy()

    def frame(self, row: int) -> Frame:
        """The row as it stands."""
        canvas, problem = self.episodes.canvas, self.episodes.problems[row]
        if problem is None:
            raise gym.error.ResetNeeded("render() before the first episode: call reset() first.")
        masked = canvas.masked[row].cpu().numpy()
        step_of, confidence = np.zeros(len(masked), dtype=np.int64), self._confidence[row].copy()
        for event in self.events[row]:
            step_of[event.position] = event.step if event.written else 0
            confidence[event.position] = event.confidence if event.written else self._confidence[row, event.position]
        words = self.episodes.denoiser.tokenizer.batch_decode(canvas.tokens[row][:, None])
        return Frame(
            prompt=problem.prompt,
            tokens=["" if hidden else word for hidden, word in zip(masked, words, strict=True)],
            step_of=step_of,
            confidence=confidence,
            step=int(canvas.steps[row]),
            title=problem.id,
            note=self.notes[row],
        )
