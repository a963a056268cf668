"""Evaluate samplers on an environment: one command, every setting stated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import dllm_gym
from dllm_gym.agents.config import EnvConfig, make_env
from dllm_gym.agents.heuristics import Margin
from dllm_gym.agents.policy import UnmaskingPolicy
from dllm_gym.agents.rollout import Evaluation, Policy, bootstrap_interval, evaluate


def evaluate_samplers(
    samplers: dict[str, Policy],
    env: EnvConfig,
    *,
    problems: int = 1000,
    split: str = "test",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Evaluation], dict]:
    """Every sampler on the first ``problems`` problems of a split.

    ``confidence_k`` is raised to what the samplers read. ``progress`` is called with (sampler, problems done, total).

    Returns:
        The evaluations, and every setting that they were made with.
    """
    if problems < 1:
        raise ValueError(f"problems={problems}: must be 1 or more.")
    env = replace(env, confidence_k=max(env.confidence_k, *map(_reads, samplers.values())))
    made = make_env(env, split)
    indices = range(min(problems, len(made.episodes.task)))
    results = {}
    for text, policy in samplers.items():
        if isinstance(policy, UnmaskingPolicy):
            policy.to(made.episodes.device).seed(seed)
        show = None if progress is None else lambda ended, text=text: progress(text, ended, len(indices))
        results[text] = evaluate(made, policy, indices, seed=seed, progress=show)
    used = {"denoiser": env.denoiser_name, "gen_length": made.episodes.gen_length, "device": str(made.episodes.device)}
    settings = {
        "env": asdict(env) | {"dataset": made.episodes.task.dataset} | used,
        "problems": len(indices),
        "split": split,
        "seed": seed,
        "version": dllm_gym.__version__,
    }
    return results, settings


def print_results(results: dict[str, Evaluation], settings: dict) -> None:
    """A table of means with 95 % bootstrap intervals over problems, and the paired differences to the first sampler.

    Tokens per forward are gen_length / NFE: positions written, those after the end of the text among them.
    """
    from rich.markup import escape
    from rich.table import Table

    env = settings["env"]
    caption = ", ".join(f"{key} {value}" for key, value in env.items() if value is not None and key != "id")
    title = f"{env['id']}, {settings['problems']} {settings['split']} problems (95 % intervals)"
    table = Table(title=title, caption=caption)
    table.add_column("sampler", no_wrap=True)
    for name in ("accuracy %", "NFE", "tokens / forward", "reward"):
        table.add_column(name, justify="right")
    for text, result in results.items():
        row = result.summary()
        table.add_row(
            escape(text),
            _with_interval(row["accuracy"], row["accuracy_interval"], 1, scale=100),
            _with_interval(row["nfe"], row["nfe_interval"], 2),
            f"{env['gen_length'] / row['nfe']:.2f}",
            _with_interval(row["reward"], row["reward_interval"], 3),
        )
    console().print(table)
    (reference, first), *others = results.items()
    for text, result in others:
        accuracy, reward = result.correct.astype(float) - first.correct, result.reward - first.reward
        print(
            f"{text} minus {reference}: "
            f"accuracy {_with_interval(accuracy.mean(), bootstrap_interval(accuracy), 1, scale=100, sign='+')}, "
            f"reward {_with_interval(reward.mean(), bootstrap_interval(reward), 3, sign='+')}"
        )


def console():
    """A console for tables, wide enough for them where the output is not a terminal."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=140)


def write_results(
    path: str | Path, results: dict[str, Evaluation], settings: dict, samplers: dict[str, Policy]
) -> None:
    """One JSON line a sampler: every setting, the means, and the result of every problem."""
    lines = []
    for text, result in results.items():
        per_problem = {
            "problem_id": result.problem_ids,
            "correct": result.correct.tolist(),
            "score": result.score.tolist(),
            "nfe": result.nfe.tolist(),
            "reward": result.reward.tolist(),
            "completion": result.completions,
        }
        about = {"sampler": text, "policy": type(samplers[text]).__name__, "policy_settings": _settings(samplers[text])}
        lines.append(json.dumps(about | settings | {"summary": result.summary()} | per_problem) + "\n")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(lines))
    temporary.replace(path)


def _with_interval(mean: float, interval: tuple[float, float], digits: int, scale: float = 1, sign: str = "") -> str:
    low, high = interval
    return f"{scale * mean:{sign}.{digits}f} [{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"


def _settings(policy: Policy) -> dict:
    """A sampler's arguments, or a learned policy's architecture."""
    if isinstance(policy, UnmaskingPolicy):
        return asdict(policy.config)
    return {f.name: getattr(policy, f.name) for f in fields(policy) if f.init}


def _reads(policy: Policy) -> int:
    """Confidences per position that a sampler needs."""
    if isinstance(policy, UnmaskingPolicy):
        return policy.config.confidence_k
    return 2 if isinstance(policy, Margin) else 1
