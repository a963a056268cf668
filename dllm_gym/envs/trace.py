"""What rendering needs to know of the past of each row: when a token was written, and how sure the denoiser was."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym
import numpy as np

from dllm_gym.envs.episodes import Episodes, Finished
from dllm_gym.rendering import Frame


class Trace:
    """Follows the rows of `Episodes`: call `begin` after rows were reset and observed, `step` after each commit."""

    def __init__(self, episodes: Episodes):
        self.episodes = episodes
        shape = (episodes.num_rows, episodes.gen_length)
        self.step_of = np.zeros(shape, dtype=np.int64)
        self.confidence = np.zeros(shape, dtype=np.float32)
        self.notes = [""] * episodes.num_rows

    def begin(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.step_of[row] = 0
            self.notes[row] = ""
        self._look()

    def step(self, finished: list[Finished]) -> None:
        steps = self.episodes.canvas.steps.cpu().numpy()
        written = ~self.episodes.canvas.masked.cpu().numpy() & (self.step_of == 0)
        self.step_of = np.where(written, steps[:, None], self.step_of)
        for end in finished:
            self.notes[end.row] = f"{'right' if end.info['correct'] else 'wrong'}, reward {end.reward:.2f}"
        self._look()

    def _look(self) -> None:
        seen = self.episodes.observation.confidence[..., 0].cpu().numpy()
        self.confidence = np.where(self.step_of == 0, seen, self.confidence)

    def frame(self, row: int) -> Frame:
        """The row as it stands."""
        canvas, problem = self.episodes.canvas, self.episodes.problems[row]
        if problem is None:
            raise gym.error.ResetNeeded("render() before the first episode: call reset() first.")
        masked = canvas.masked[row].cpu().numpy()
        words = self.episodes.denoiser.tokenizer.batch_decode(canvas.tokens[row][:, None])
        return Frame(
            prompt=problem.prompt,
            tokens=["" if hidden else word for hidden, word in zip(masked, words, strict=True)],
            step_of=self.step_of[row].copy(),
            confidence=self.confidence[row].copy(),
            step=int(canvas.steps[row]),
            title=problem.id,
            note=self.notes[row],
        )
