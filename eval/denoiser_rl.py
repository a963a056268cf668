"""Objectives for the denoiser side by side: ``python -m dllm_gym.eval.denoiser_rl`` makes the tables of the docs.

Every objective trains with its default configuration (or the settings given) from each seed, and is compared with the
denoiser that training began with and with the other objectives on the same held-out problems. Runs that are finished
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

from dllm_gym.agents.denoiser_rl import OBJECTIVES, load_objective, trainer
from dllm_gym.agents.denoiser_rl.report import DenoiserReportConfig, evaluate_denoiser
from dllm_gym.agents.rollout import bootstrap_interval
from dllm_gym.agents.samplers import make_sampler
from dllm_gym.denoisers.pretrained import load_denoiser


@dataclass
class Config:
    """Train denoisers with several objectives from several seeds."""

    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    """To compare."""
    tasks: tuple[str, ...] = ("Sudoku",)
    """Tasks, as in the ids."""
    learning_rates: tuple[float, ...] = (0.0,)
    """To try; 0: the objective's default."""
    iterations: int | None = None
    """None: the objective's default."""
    seeds: int = 3
    """Seeds 0, 1, ..."""
    problems: int = 1000
    """Held-out problems: the first of the test split, or of the end of the training split with ``validate``."""
    validate: bool = False
    """Evaluate on training problems that come last: for choosing settings."""
    samplers: tuple[str, ...] = DenoiserReportConfig.samplers
    """What decodes at the evaluation."""
    baselines: tuple[str, ...] = ("elbo-pg", "diffu-grpo")
    """SPG and GDSD are compared with these."""
    dtype: str = "auto"
    """Of the denoiser; "bfloat16" is twice as fast on a CPU with bf16 units."""
    workers: int = 2
    """Runs at a time, each with one thread."""
    folder: str = "runs/denoiser-rl"
    """Where the runs, evaluations and tables lie."""


@dataclass(frozen=True)
class Job:
    """One training run; ``seed`` None: the denoiser before it."""

    objective: str
    task: str
    learning_rate: float
    seed: int | None

    @property
    def name(self) -> str:
        if self.seed is None:
            return f"before-{self.task}"
        rate = f"-lr{self.learning_rate:g}" if self.learning_rate else ""
        return f"{self.objective}-{self.task}{rate}-seed{self.seed}"


def run_job(job: Job, config: Config) -> Path:
    """Train and evaluate one denoiser; returns the file of its evaluation."""
    torch.set_num_threads(1)
    folder = Path(config.folder) / job.name
    result = folder / ("validation.npz" if config.validate else "evaluation.npz")
    if result.exists():
        return result
    config_type, loss = load_objective(job.objective)
    settings = config_type(seed=job.seed or 0, threads=1, report=DenoiserReportConfig(enabled=False))
    env = replace(settings.env, id=f"MaskedDiffusion-{job.task}-v0", dtype=config.dtype)
    settings = replace(settings, env=env)
    if job.learning_rate:
        settings = replace(settings, learning_rate=job.learning_rate)
    if config.iterations:
        settings = replace(settings, iterations=config.iterations)
    source = env.denoiser_name
    if job.seed is not None:
        if not (folder / "summary.json").exists():
            where = {"resume": str(folder)} if list(folder.glob("checkpoint-*")) else {"run_dir": str(folder)}
            if "run_dir" in where:
                (folder / "config.json").unlink(missing_ok=True)  # stopped before its first checkpoint
                (folder / "metrics.jsonl").unlink(missing_ok=True)
            trainer.train(job.objective, replace(settings, **where), loss)
        source = str(folder / "denoiser")
    folder.mkdir(parents=True, exist_ok=True)
    denoiser = load_denoiser(source, dtype=config.dtype)
    samplers = {text: make_sampler(text) for text in config.samplers}
    split = "train" if config.validate else "test"
    evaluations = evaluate_denoiser(denoiser, samplers, config.problems, env, split, last=config.validate)
    np.savez(result, **{text: np.stack([e.correct, e.nfe]) for text, e in evaluations.items()})
    return result


def compare(task: str, rate: float, sampler: str, config: Config) -> list[dict]:
    """One row an objective: accuracy over seeds, gain over the start, and over the baselines, paired by problem."""
    file = "validation.npz" if config.validate else "evaluation.npz"

    def load(objective: str, seed: int | None) -> np.ndarray:
        return np.load(Path(config.folder) / Job(objective, task, rate, seed).name / file)[sampler][0].astype(float)

    before = load("", None)
    runs = {name: np.stack([load(name, seed) for seed in range(config.seeds)]) for name in config.objectives}

    def over(name: str, other: np.ndarray) -> list[float]:
        difference = runs[name].mean(axis=0) - other
        return [float(difference.mean()), *bootstrap_interval(difference)]

    return [
        {
            "task": task,
            "rate": rate,
            "sampler": sampler,
            "objective": name,
            "before": before.mean(),
            "accuracy": runs[name].mean(),
            "by_seed": runs[name].mean(axis=1).tolist(),
            "gain": over(name, before),
            "over": {
                other: over(name, runs[other].mean(axis=0))
                for other in config.baselines
                if other in runs and name != other
            },
        }
        for name in config.objectives
    ]


def table(rows: list[dict], baselines: tuple[str, ...]) -> str:
    """Rows of `compare` as a Markdown table, in points of accuracy."""

    def points(values: list[float] | None) -> str:
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in values)) if values else ""

    names = ["task", "decoded by", "objective", "before %", "after %", "by seed", "gain [95 %]"]
    lines = [" | ".join(["", *names, *(f"over {name}" for name in baselines), ""]).strip()]
    lines.append("| " + " | ".join("---" for _ in range(len(names) + len(baselines))) + " |")
    for row in rows:
        rate = f" (lr {row['rate']:g})" if row["rate"] else ""
        cells = [
            row["task"],
            row["sampler"],
            row["objective"] + rate,
            f"{100 * row['before']:.1f}",
            f"{100 * row['accuracy']:.1f}",
            ", ".join(f"{100 * a:.1f}" for a in row["by_seed"]),
            points(row["gain"]),
            *(points(row["over"].get(name)) for name in baselines),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(path: Path, config: Config, task: str, rate: float) -> None:
    """Accuracy of the sampled completions over iterations' seconds: the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in config.objectives:
        curves = []
        for seed in range(config.seeds):
            lines = (Path(config.folder) / Job(name, task, rate, seed).name / "metrics.jsonl").read_text()
            points = [(row["forwards"], row["accuracy"]) for row in map(json.loads, lines.splitlines())]
            curves.append(np.array(points).T)
        grid = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 60)
        mean = np.mean([np.interp(grid, *curve) for curve in curves], axis=0)
        smooth = np.convolve(np.pad(mean, 2, mode="edge"), np.ones(5) / 5, mode="valid")
        axes.plot(grid, smooth, label=name)
    axes.set(xlabel="denoiser forwards (rows) while sampling", ylabel="accuracy of the samples", title=task)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(config: Config) -> None:
    """Train what is missing, then print the tables and draw the curves."""
    cells = list(product(config.tasks, config.learning_rates))
    jobs = [Job(name, *cell, seed) for seed in range(config.seeds) for cell in cells for name in config.objectives]
    jobs += [Job(config.objectives[0], task, 0.0, None) for task in config.tasks]
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(run_job, job, config) for job in jobs]:
            print(future.result(), flush=True)
    rows = [row for cell in cells for sampler in config.samplers for row in compare(*cell, sampler, config)]
    text = table(rows, config.baselines)
    print(f"{config.seeds} seeds, {config.problems} problems\n\n{text}")
    (Path(config.folder) / "table.md").write_text(text + "\n")
    for task, rate in cells:
        draw_curves(Path(config.folder) / f"curves-{task}{f'-lr{rate:g}' if rate else ''}.png", config, task, rate)


if __name__ == "__main__":
    main(tyro.cli(Config))
