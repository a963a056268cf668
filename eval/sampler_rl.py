"""Learned samplers against thresholds: ``python -m dllm_gym.eval.sampler_rl`` makes the tables and curves of the docs.

For each task, block length, alpha and algorithm a policy is trained from each seed, evaluated on held-out problems,
and compared with the best threshold, which is chosen on other problems for the same reward. Runs that are finished
are not repeated, so an interrupted command continues where it was.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro

from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.evaluation import Evaluation, bootstrap_interval, evaluate
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.samplers.policy import load_policy
from dllm_gym.agents.trainers.policy import grpo, ppo, sb3_ppo
from dllm_gym.agents.trainers.policy.comparison import ReportConfig
from dllm_gym.eval.command import one_line
from dllm_gym.files import write_text, written
from dllm_gym.rewards import multiplicative

TRAINERS = {
    "grpo": (grpo.GRPOConfig, grpo.train),
    "ppo": (ppo.PPOConfig, ppo.train),
    "sb3-ppo": (sb3_ppo.SB3PPOConfig, sb3_ppo.train),
}
NAMES = {"grpo": "GRPO", "ppo": "PPO", "sb3-ppo": "SB3 PPO"}
TEST_SEED = 0


@dataclass
class Config:
    """Train samplers from several seeds and compare them with the best threshold."""

    tasks: tuple[str, ...] = ("GSM8K", "Countdown")
    """Tasks, as in the ids."""
    blocks: tuple[int, ...] = (0,)
    """Block lengths; 0 is full diffusion."""
    alphas: tuple[float, ...] = (1.0,)
    """Weights of the cost of steps."""
    algorithms: tuple[str, ...] = ("grpo",)
    """Of "grpo", "ppo", "sb3-ppo", each with its default configuration."""
    iterations: int | None = None
    """Of GRPO and PPO; None: their default."""
    seeds: int = 3
    """Seeds 0, 1, ..."""
    problems: int = 1000
    """Held-out problems: the first of the test split."""
    validation_problems: int = 512
    """Problems on which thresholds are chosen: the last of the training split."""
    thresholds: tuple[float, ...] = ReportConfig.thresholds
    """To choose from."""
    dtype: str = "auto"
    """Of the denoiser; "bfloat16" is twice as fast on a CPU with bf16 units."""
    workers: int = 2
    """Runs at a time, each with one thread."""
    folder: str = "runs/sampler-rl"
    """Where the runs, evaluations, tables and curves lie; what is there already is not made again, so other iterations
    or another dtype want another folder."""


@dataclass(frozen=True)
class Job:
    """One training run."""

    algorithm: str
    task: str
    block: int
    alpha: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.task}-block{self.block}-alpha{self.alpha:g}-seed{self.seed}"

    def env(self, dtype: str, num_envs: int) -> EnvConfig:
        return EnvConfig(
            id=f"MaskedDiffusion-{self.task}-v0",
            block_length=self.block or None,
            alpha=self.alpha,
            dtype=dtype,
            num_envs=num_envs,
        )


def run_job(job: Job, config: Config) -> Path:
    """Train and evaluate one policy; returns the file of its evaluation."""
    torch.set_num_threads(1)
    folder = Path(config.folder) / job.name
    result = folder / "evaluation.npz"
    if result.exists():
        return result
    config_type, train = TRAINERS[job.algorithm]
    settings = config_type(seed=job.seed, threads=1, report=ReportConfig(enabled=False))
    settings = replace(settings, env=job.env(config.dtype, settings.env.num_envs))
    if config.iterations:
        settings = replace(settings, iterations=config.iterations)
    where = {"resume": str(folder)} if list(folder.glob("checkpoint-*")) else {"run_dir": str(folder)}
    if "run_dir" in where:
        (folder / "config.json").unlink(missing_ok=True)  # a run that was stopped before its first checkpoint
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    train(replace(settings, **where))
    policy = load_policy(folder, "cuda" if torch.cuda.is_available() else "cpu").seed(TEST_SEED)
    _save(result, _evaluate(job, config, policy, "test"))
    return result


def evaluate_thresholds(job: Job, config: Config) -> Path:
    """Every threshold on validation and test problems; the reward follows later from score and NFE."""
    torch.set_num_threads(1)
    folder = Path(config.folder) / f"thresholds-{job.task}-block{job.block}"
    for threshold, split in product(config.thresholds, ("train", "test")):
        path = folder / f"{threshold:g}-{split}.npz"
        if not path.exists():
            _save(path, _evaluate(job, config, make_policy("threshold", threshold=threshold), split))
    return folder


def _evaluate(job: Job, config: Config, policy, split: str) -> Evaluation:
    env = make_env(job.env(config.dtype, 200), split)
    size = len(env.episodes.task)
    problems = range(config.problems) if split == "test" else range(size - config.validation_problems, size)
    return evaluate(env, policy, problems)


def _save(path: Path, result: Evaluation) -> None:
    with written(path) as temporary:
        np.savez(temporary, correct=result.correct, nfe=result.nfe, score=result.score)


def compare(algorithm: str, task: str, block: int, alpha: float, config: Config) -> dict:
    """One row of the table: learned policies of all seeds against the chosen threshold."""
    length = make_env(Job(algorithm, task, block, alpha, 0).env(config.dtype, 1)).episodes.gen_length

    def load(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        arrays = np.load(path)
        pairs = zip(arrays["score"], arrays["nfe"], strict=True)
        reward = np.array([multiplicative(float(s), int(n), length, alpha) for s, n in pairs])
        return arrays["correct"].astype(float), arrays["nfe"].astype(float), reward

    folder = Path(config.folder)
    thresholds = folder / f"thresholds-{task}-block{block}"
    chosen = max(config.thresholds, key=lambda t: load(thresholds / f"{t:g}-train.npz")[2].mean())
    correct, nfe, reward = load(thresholds / f"{chosen:g}-test.npz")
    runs = [
        load(folder / Job(algorithm, task, block, alpha, seed).name / "evaluation.npz") for seed in range(config.seeds)
    ]
    difference = np.stack([run[2] for run in runs]) - reward
    return {
        "task": task,
        "block": block or "full",
        "alpha": alpha,
        "algorithm": algorithm,
        "threshold": chosen,
        "threshold_accuracy": correct.mean(),
        "threshold_nfe": nfe.mean(),
        "threshold_reward": reward.mean(),
        "accuracy": np.mean([run[0].mean() for run in runs]),
        "nfe": np.mean([run[1].mean() for run in runs]),
        "reward": np.mean([run[2].mean() for run in runs]),
        "difference": difference.mean(),
        "interval": bootstrap_interval(difference.mean(axis=0)),
        "by_seed": difference.mean(axis=1).tolist(),
    }


def table(rows: list[dict]) -> str:
    """Rows of `compare` as a Markdown table."""
    lines = [
        "| task | block | alpha | learned by | accuracy % / NFE / reward | best threshold: accuracy % / NFE / reward "
        "| reward difference [95 %] | by seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['task']} | {row['block']} | {row['alpha']:g} | {NAMES[row['algorithm']]} "
            f"| {100 * row['accuracy']:.1f} / {row['nfe']:.1f} / {row['reward']:.3f} "
            f"| {row['threshold']:g}: {100 * row['threshold_accuracy']:.1f} / {row['threshold_nfe']:.1f} "
            f"/ {row['threshold_reward']:.3f} "
            f"| {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"| {', '.join(f'{d:+.3f}' for d in row['by_seed'])} |"
        )
    return "\n".join(lines)


def draw_curves(path: Path, config: Config, task: str, block: int, alpha: float) -> None:
    """Training reward over denoiser forwards: the mean over seeds, and each seed faintly."""
    from matplotlib.figure import Figure  # not pyplot, whose backend and figures are the caller's

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for algorithm, colour in zip(config.algorithms, ("tab:red", "tab:orange", "tab:purple"), strict=False):
        curves = []
        for seed in range(config.seeds):
            lines = (Path(config.folder) / Job(algorithm, task, block, alpha, seed).name / "metrics.jsonl").read_text()
            points = [(row["forwards"], row["reward"]) for row in map(json.loads, lines.splitlines())]
            curves.append(np.array(points).T)
            axes.plot(*curves[-1], color=colour, alpha=0.25, linewidth=1)
        grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 200)
        mean = np.mean([np.interp(grid, *curve) for curve in curves], axis=0)
        axes.plot(grid, mean, color=colour, label=f"{NAMES[algorithm]}, mean of {config.seeds} seeds")
    axes.set(xlabel="denoiser forwards (rows)", ylabel="training reward", title=f"{task}, alpha {alpha:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    with written(path) as temporary:
        figure.savefig(temporary, dpi=150)


def main(config: Config) -> None:
    """Train what is missing, then print the table and draw the curves."""
    cells = list(product(config.tasks, config.blocks, config.alphas))
    jobs = [Job(a, *cell, seed) for seed in range(config.seeds) for cell in cells for a in config.algorithms]
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        settings = {(task, block): Job("grpo", task, block, 1.0, 0) for task, block, _ in cells}
        waiting = [pool.submit(run_job, job, config) for job in jobs]
        waiting += [pool.submit(evaluate_thresholds, job, config) for job in settings.values()]
        for future in waiting:
            error = future.exception()
            print(f"failed: {one_line(error)}" if error else future.result(), flush=True)
    if failed := sum(future.exception() is not None for future in waiting):
        raise SystemExit(f"{failed} of {len(waiting)} failed; what succeeded is kept.")
    rows = [compare(a, *cell, config) for cell in cells for a in config.algorithms]
    text = table(rows)
    print(f"{config.seeds} seeds, {config.problems} held-out problems\n\n{text}")
    write_text(Path(config.folder) / "table.md", text + "\n")
    for task, block, alpha in cells:
        draw_curves(Path(config.folder) / f"curves-{task}-block{block}-alpha{alpha:g}.png", config, task, block, alpha)


if __name__ == "__main__":
    main(tyro.cli(Config))
