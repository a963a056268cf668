"""What was written down once: figures, seeds, results files and runs of version 0.2.0.

``python tests/test_recorded.py`` writes them anew; do so only where the behaviour is meant to change, and say so in the
changelog.
"""

import json
import math
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import pytest

import dllm_gym  # noqa: F401
from dllm_gym.agents.cli import main as train
from dllm_gym.eval.cli import main as evaluate

RECORDED = Path(__file__).parent / "recorded"
FIGURES = RECORDED / "figures.json"
VARYING = {"seconds", "tokens_per_second", "examples_per_second", "sampling_share", "peak_memory_gb"}

ENVIRONMENTS = {
    "full diffusion": {},
    "blocks": {"block_length": 4},
    "temperature": {"temperature": 1.0, "confidence_k": 2},
    "additive": {"reward": "additive", "alpha": 0.5, "stop_at_eos": False},
    "step limit": {"max_steps": 5, "empty_action": "noop"},
}
POLICY = "--env.id MaskedDiffusion-Countdown-v0 --env.num-envs 6 --policy.hidden-dim 16 --policy.mlp-dim 16 "
POLICY += "--report.no-enabled --threads 1 "
DENOISER = "--env.num-envs 8 --iterations 2 --problems 2 --group 3 --report.no-enabled --threads 1 "
TRAININGS = {
    "grpo": POLICY + "--iterations 3 --problems 2 --group 2 --experts 0.5 --expert-iterations 1",
    "grpo dpls": POLICY + "--iterations 2 --problems 2 --group 2 --experts 0.5 --policy.distribution dpls",
    "ppo": POLICY + "--iterations 3 --episodes 4 --epochs 2 --minibatches 2",
    "sb3-ppo": POLICY + "--timesteps 192 --steps 16 --batch-size 32",
    "spg": DENOISER + "--negative-scale 0 --learning-rate 3e-4",
    "gdsd": DENOISER + "--microbatch 2",
    "gdsd-tlc": DENOISER,
    "espo": DENOISER,
    "diffu-grpo": DENOISER + "--inner-iterations 2",
    "unigrpo": DENOISER,
    "coupled-grpo": DENOISER + "--lora.rank 2",
    "wd1": DENOISER,
    "elbo-pg": DENOISER + "--corruption.kind block --env.block-length 4",
    "joint": "--env.num-envs 4 --rounds 1 --report.no-enabled --threads 1 --grpo.iterations 1 --grpo.problems 1 "
    "--grpo.group 2 --denoiser.iterations 1 --denoiser.problems 1 --denoiser.group 2",
    "sft": "--steps 2 --batch.countdown 3 --batch.gsm8k 1 --batch.sudoku 1 "
    "--hidden-size 16 --num-layers 1 --num-heads 2 --no-bf16 --log-every 1",
}
CELLS = {
    "heuristics": "--sampler threshold --sampler random:k=2 --sampler margin --sampler entropy-bounded:gamma=0.5 "
    "--sampler tempered-confidence:k=3 --sampler factor --sampler left-to-right --env.id MaskedDiffusion-Countdown-v0",
    "temperature": "--sampler threshold:threshold=0.5 --env.temperature 0.7 --samples 2 "
    "--env.id MaskedDiffusion-Sudoku-v0",
    "metropolis": "--sampler metropolis:alpha=2,steps=3 --sampler metropolis:likelihood=elbo,steps=2,maskings=2 "
    "--env.temperature 1 --env.block-length 2 --env.id MaskedDiffusion-Oracle-v0 --samples 2",
}


def steps_of(settings: dict) -> list:
    """Rewards, sets and tokens of 30 steps of three rows, whose actions follow from what they see."""
    env = gym.make_vec("MaskedDiffusion-Countdown-v0", num_envs=3, observe=("confidence", "entropy"), **settings)
    seen, _ = env.reset(seed=5)
    shown = []
    for step in range(30):
        confident = seen["confidence"][..., 0] > (0.3 + 0.02 * step)
        seen, reward, ended, _, infos = env.step(confident & (seen["eligible"] == 1))
        likelihood = infos["final_info"]["log_likelihood"][ended].tolist() if ended.any() else []
        shown.append(
            {
                "reward": reward.tolist(),
                "unmasked": infos["unmasked"].sum(axis=1).tolist(),
                "tokens": infos["tokens"].sum(axis=1).tolist(),
                "probability": infos["probability"].sum(axis=1).tolist(),
                "entropy": seen["entropy"].sum(axis=1).tolist(),
                "log_likelihood": likelihood,
            }
        )
    return shown


def metrics_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.rpartition("/")[2] not in VARYING} for row in rows]


def training(name: str, folder: Path) -> list[dict]:
    assert train([name.split()[0], *TRAININGS[name].split(), "--run-dir", str(folder)]) == 0
    return metrics_of(folder)


def lines_of(path: Path) -> list[dict]:
    """The lines of a results file, problems in order, without what hangs on the clock and the machine's threads."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    samplers = {line["cell"]: line["settings"]["sampler"] for line in lines if line["kind"] == "cell"}
    kept = [{k: v for k, v in line.items() if k not in ("seconds", "prompt")} for line in lines]
    kept = [line | {"cell": samplers[line["cell"]]} for line in kept]
    return sorted(kept, key=lambda line: (line["cell"], line["kind"], line.get("index", 0), str(line.get("tokens"))))


def cells(name: str, folder: Path) -> list[dict]:
    path = folder / "results.jsonl"
    assert evaluate([*CELLS[name].split(), *"--env.num-envs 5 --problems 6 --output".split(), str(path)]) == 0
    return lines_of(path)


def assert_equal(now, before, where: str = "") -> None:
    """Equal, floats within rounding."""
    if isinstance(before, dict):
        assert now.keys() == before.keys(), where
        for key in before:
            assert_equal(now[key], before[key], f"{where}.{key}")
    elif isinstance(before, list):
        assert len(now) == len(before), where
        for i, (mine, theirs) in enumerate(zip(now, before, strict=True)):
            assert_equal(mine, theirs, f"{where}[{i}]")
    elif isinstance(before, float) and not isinstance(now, bool):
        assert math.isclose(now, before, rel_tol=2e-3, abs_tol=2e-5), f"{where}: {now} instead of {before}"
    else:
        assert now == before, f"{where}: {now!r} instead of {before!r}"


def recorded(kind: str, name: str):
    return json.loads(FIGURES.read_text())[kind][name]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments(name):
    assert_equal(steps_of(ENVIRONMENTS[name]), recorded("environments", name))


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings(name, tmp_path):
    assert_equal(training(name, tmp_path / "run"), recorded("trainings", name))


@pytest.mark.parametrize("name", CELLS)
def test_cells(name, tmp_path):
    now, before = cells(name, tmp_path), recorded("cells", name)
    for mine, theirs in zip(now, before, strict=True):
        if mine["kind"] == "cell":  # settings that are new have their defaults
            env = mine["settings"]["env"]
            mine["settings"]["env"] = {name: env[name] for name in theirs["settings"]["env"]}
    assert_equal(now, before)


@pytest.mark.parametrize("name", ["grpo", "ppo", "sb3-ppo"])
def test_runs_continue(name, tmp_path):
    """A run of version 0.2.0 that was stopped halfway ends as it would have there (SB3's not bit for bit)."""
    folder = tmp_path / "run"
    shutil.copytree(RECORDED / f"run-{name}", folder)
    assert train([name, "--resume", str(folder)]) == 0
    assert (folder / "policy" / "policy.safetensors").exists()
    if name != "sb3-ppo":
        assert_equal(metrics_of(folder), recorded("trainings", name))


def test_results_continue(tmp_path):
    """A cell of version 0.2.0 of which two problems are missing: they are added to it."""
    path = tmp_path / "results.jsonl"
    shutil.copy(RECORDED / "part.jsonl", path)
    flags = "--sampler threshold --env.id MaskedDiffusion-Countdown-v0 --env.num-envs 5 --problems 6 --output"
    assert evaluate([*flags.split(), str(path)]) == 0
    assert len({json.loads(line)["cell"] for line in path.read_text().splitlines()}) == 1
    whole = [line for line in recorded("cells", "heuristics") if line["cell"] == "threshold"]
    problems = [line for line in lines_of(path) if line["kind"] == "problem"]
    assert_equal(problems, [line for line in whole if line["kind"] == "problem"])


def record() -> None:
    import tempfile

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        figures = {
            "environments": {name: steps_of(settings) for name, settings in ENVIRONMENTS.items()},
            "trainings": {name: training(name, folder / name) for name in TRAININGS},
            "cells": {},
        }
        for name in CELLS:
            (folder / f"cells-{name}").mkdir()
            figures["cells"][name] = cells(name, folder / f"cells-{name}")
        for name in ("grpo", "ppo", "sb3-ppo"):
            run, kept = folder / f"half-{name}", RECORDED / f"run-{name}"
            every = ["--checkpoint-every", "1"] if name == "sb3-ppo" else ["--checkpoint-every", "2"]
            assert train([name, *TRAININGS[name].split(), *every, "--run-dir", str(run)]) == 0
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            oldest = min(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            shutil.copytree(oldest, kept / oldest.name)
            for file in ("config.json", "metrics.jsonl"):
                shutil.copy(run / file, kept / file)
        lines = (folder / "cells-heuristics" / "results.jsonl").read_text().splitlines()
        key = json.loads(lines[0])["cell"]
        mine = [line for line in lines if json.loads(line)["cell"] == key]
        part = [line for line in mine if json.loads(line)["kind"] in ("cell", "problem")][:5]
        (RECORDED / "part.jsonl").write_text("".join(line + "\n" for line in part))
    FIGURES.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    sys.exit(record())
