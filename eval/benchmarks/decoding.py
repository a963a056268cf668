"""How fast, measured side by side in one run: ``python -m dllm_gym.eval.benchmarks.decoding [flags]``.

Three questions. Is time spent in the denoiser, or around it? Is one forward for all rows worth it? And does an
evaluation, whose rows are refilled and stop at the end of their text, beat the loop that published code runs?

The contestants take turns, in alternating order, after a warm-up; the table has the median over repeats, with the
least and the most in brackets. With ``--trainer spg`` it is a trainer that is measured (`benchmarks.trainer`), with
``--caches --model.size llada-17m`` the caches (`benchmarks.caches`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import gymnasium as gym
import numpy as np
import torch

from dllm_gym import decoding
from dllm_gym.agents.environment import EnvConfig, gym_arguments, make_env
from dllm_gym.agents.terminal import console
from dllm_gym.envs.episodes import Episodes
from dllm_gym.eval.benchmarks.caches import measure_caches
from dllm_gym.eval.benchmarks.random_llama import ModelConfig
from dllm_gym.eval.benchmarks.timing import median, now
from dllm_gym.eval.benchmarks.trainer import measure_trainer
from dllm_gym.eval.command import run
from dllm_gym.eval.evaluate import CellConfig, evaluate_cell


@dataclass
class ThroughputConfig:
    """Measure where the time goes."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(num_envs=32))
    """The environment. Tokens are the argmax whatever its temperature, except when a trainer is measured."""
    threshold: float = 0.9
    """Threshold of the sampler."""
    steps: int = 60
    """Number of environment steps per repeat."""
    episodes: int = 256
    """Number of completions decoded per repeat."""
    repeats: int = 5
    """Number of repeats per contestant, after one to warm up."""
    threads: int | None = None
    """Number of torch threads on the CPU; None keeps torch's default."""
    trainer: str | None = None
    """Name of a trainer of the denoiser ("spg", "gdsd", ...) to measure instead."""
    caches: bool = False
    """Measure the caches of decoding instead, on the denoiser of `model`, in blocks of `env.block_length` or 32."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """A denoiser of any size with random weights, for the caches, and beside the environment's for a trainer."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a mistake in what was given."""
    return run("dllm_gym.eval.benchmarks.decoding", ThroughputConfig, measure, argv)


def measure(config: ThroughputConfig) -> None:
    """Run every contestant and print the table."""
    for name in ("steps", "episodes", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be 1 or more.")
    if config.trainer:
        measure_trainer(config.trainer, config.env, config.model, config.repeats, config.threads)
        return
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.caches:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        measure_caches(config.model, config.env.block_length or 32, config.repeats, device)
        return
    env = make_env(config.env, "test", temperature=0.0)
    episodes, rows = env.unwrapped.episodes, env.num_envs
    env_id, settings = gym_arguments(config.env)
    settings |= {"split": "test", "temperature": 0.0, "denoiser": episodes.denoiser}
    del settings["num_envs"]
    singles = [gym.make(env_id, **settings).unwrapped for _ in range(rows)]
    problems = list(range(min(config.episodes, len(episodes.task))))
    prompts = [episodes.encode_prompt(episodes.task[i % len(episodes.task)]) for i in range(rows)]
    together, *alone = (
        decoding.blank(group, episodes.gen_length, episodes.denoiser.mask_token_id)
        for group in (prompts, *zip(prompts))
    )
    forwards = max(1, config.steps // 10)
    sampler = f"threshold:threshold={config.threshold}"
    asked = CellConfig(sampler, replace(config.env, temperature=0.0), problems=len(problems), films=0)
    contestants: dict[str, Callable] = {
        "vector": lambda: step_vector(env, config.steps, config.threshold),
        "singles": lambda: step_singles(singles, config.steps, config.threshold),
        "full": lambda: [episodes.denoiser.predict(together) for _ in range(forwards)],
        "alone": lambda: [episodes.denoiser.predict(canvas) for _ in range(forwards) for canvas in alone],
        "evaluation": lambda: evaluate_cell(asked),
        "static": lambda: decode_static(episodes, problems, rows, config.threshold),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, list] = {name: [] for name in contestants}
    for repeat in range(config.repeats + 1):
        for name in list(contestants)[:: 1 if repeat % 2 else -1]:
            start = now(episodes.device)
            results[name].append(contestants[name]())
            seconds[name].append(now(episodes.device) - start)
    times = {name: np.array(values[1:]) for name, values in seconds.items()}

    def rates(units: int, *names: str) -> str:
        return " and ".join(f"{units / np.median(times[name]):.3g}" for name in names)

    from rich.table import Table

    table = Table(
        title=f"{env_id}, denoiser {config.env.denoiser_name}, gen_length {episodes.gen_length}, {episodes.device}, "
        f"dtype {config.env.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{config.repeats} repeats",
        caption="median of the repeats, the least and the most in brackets",
    )
    for name in ("figure", "measured", "goal", "compared with", "setting"):
        table.add_column(name)
    row_steps, row_forwards = rows * config.steps, rows * forwards
    cell = results["evaluation"][-1]
    same = sum(a == b for a, b in zip(cell.completion[:, 0], results["static"][-1], strict=True))
    table.add_row(
        "time in the denoiser's forward",
        median(100 * np.array(results["vector"][1:]), ".1f", " %"),
        ">= 85 %",
        "wall time of reset and steps",
        f"vector environment of {rows} rows, {config.steps} steps",
    )
    table.add_row(
        "vector environment",
        median(times["singles"] / times["vector"], ".2f", "x"),
        ">= 2.5x",
        "single environments in a loop",
        f"{rows} rows; {rates(row_steps, 'vector', 'singles')} rows/s",
    )
    table.add_row(
        "bare forward",
        median(times["alone"] / times["full"], ".2f", "x"),
        "reference",
        "the same rows one at a time",
        f"{rows} rows; {rates(row_forwards, 'full', 'alone')} rows/s",
    )
    table.add_row(
        "evaluation",
        median(times["static"] / times["evaluation"], ".2f", "x"),
        ">= 2x",
        "static batches, full softmax",
        f"{rows} rows, threshold {config.threshold:g}, {len(problems)} problems; "
        f"{rates(cell.length.sum(), 'evaluation', 'static')} response tokens/s",
    )
    table.add_row(
        "identical completions",
        f"{same} of {len(problems)}",
        "all, in float32",
        "static batches, full softmax",
        "text before its end",
    )
    console().print(table)


def step_vector(env, steps: int, threshold: float) -> float:
    """Step the vector environment with a threshold on what it shows; the share of time inside `Denoiser.predict`."""
    episodes = env.unwrapped.episodes
    with _timed_predict(episodes) as spent:
        start = now(episodes.device)
        observation, _ = env.reset(seed=0)
        for _ in range(steps):
            observation, *_ = env.step(_action(observation, threshold))
        return spent[0] / (now(episodes.device) - start)


def step_singles(envs: list[gym.Env], steps: int, threshold: float) -> None:
    """The same rows, the same work, as environments of their own: row i seeded i."""
    observations = [env.reset(seed=i)[0] for i, env in enumerate(envs)]
    for _ in range(steps):
        for i, env in enumerate(envs):
            observations[i], _, ended, _, _ = env.step(_action(observations[i], threshold))
            if ended:
                observations[i], _ = env.reset()


@torch.inference_mode()
def decode_static(episodes: Episodes, problems: list[int], rows: int, threshold: float) -> list[str]:
    """The loop of published code (LLaDA's and Fast-dLLM's ``generate``), its threshold decided per row.

    Batches stay together until their slowest row is done: rows that are through are computed still, and so is the text
    after an end token. Logits of the whole sequence, a float32 softmax over ``[B, L, V]`` at every position.
    """
    denoiser, length, mask = episodes.denoiser, episodes.gen_length, episodes.denoiser.mask_token_id
    texts = []
    for start in range(0, len(problems), rows):
        batch = [episodes.task[i] for i in problems[start : start + rows]]
        canvas = decoding.blank([episodes.encode_prompt(problem) for problem in batch], length, mask)
        everywhere = torch.ones_like(canvas.masked)
        for end in range(episodes.block_length, length + 1, episodes.block_length):
            block = torch.arange(length, device=episodes.device) < end
            while (eligible := (canvas.tokens == mask) & block).any():
                logits = denoiser.head(denoiser.features(canvas, everywhere)).view(len(batch), length, -1)
                logits[..., mask] = -torch.inf
                confidence, token = logits.float().softmax(dim=-1).max(dim=-1)
                confidence = confidence.where(eligible, -torch.inf)
                best = torch.zeros_like(eligible).scatter_(1, confidence.argmax(dim=1, keepdim=True), True)
                canvas.tokens = token.where(eligible & ((confidence > threshold) | best), canvas.tokens)
        tokens = decoding.completions(canvas, episodes.end_tokens)
        texts += [denoiser.tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
        for problem, text in zip(batch, texts[start:], strict=True):
            episodes.task.verify(problem, text)
    return texts


def _action(observation: dict[str, np.ndarray], threshold: float) -> np.ndarray:
    return (observation["confidence"][..., 0] > threshold) & (observation["eligible"] == 1)


@contextmanager
def _timed_predict(episodes: Episodes) -> Iterator[list[float]]:
    """Yields a list whose one entry is the seconds spent in `predict` since."""
    predict, spent = episodes.denoiser.predict, [0.0]

    def timed(*args, **kwargs):
        start = now(episodes.device)
        prediction = predict(*args, **kwargs)
        spent[0] += now(episodes.device) - start
        return prediction

    episodes.denoiser.predict = timed
    try:
        yield spent
    finally:
        del episodes.denoiser.predict


if __name__ == "__main__":
    sys.exit(main())
