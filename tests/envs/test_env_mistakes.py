"""What environments refuse: arguments, actions, checkpoints; each with one clear line."""

import json
import math
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from errors import error_of
from safetensors.torch import load_file, save_file

import dllm_gym
from dllm_gym.denoisers.checkpoints import EMBEDDED
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv

# Bad input


BAD_ARGUMENTS = [
    (ValueError, {"gen_length": 64, "block_length": 7}, ["block_length=7", "gen_length=64", "16, 32, 64"]),
    (ValueError, {"block_length": 0}, ["block_length=0", "[1, 2, 4]"]),
    (ValueError, {"gen_length": 0}, ["gen_length=0", "1 or more"]),
    (ValueError, {"max_steps": 0}, ["max_steps=0", "1 or more"]),
    (ValueError, {"temperature": -1.0}, ["temperature=-1.0", "0 (argmax) or more"]),
    (ValueError, {"confidence_k": 9}, ["confidence_k=9", "1 to 6"]),
    (ValueError, {"observe": ("nonsense",)}, ["observe=('nonsense',)", "confidence", "entropy", "token"]),
    (ValueError, {"observe": ()}, ["observe=()", "one or more"]),
    (ValueError, {"reward": "quick"}, ["reward='quick'", "additive", "multiplicative"]),
    (ValueError, {"empty_action": "all"}, ["empty_action='all'", "best", "noop"]),
    (ValueError, {"render_mode": "vr"}, ["render_mode='vr'", "ansi", "rgb_array", "human"]),
    (ValueError, {"task": "chess"}, ["task='chess'", "countdown", "gsm8k", "sudoku"]),
    (ValueError, {"task": "sudoku", "split": "dev"}, ["split='dev'", "train", "test"]),
    (ValueError, {"task": "sudoku", "dataset": "hub"}, ["dataset='hub'", "local", "Puzzle"]),
    (FileNotFoundError, {"task": "sudoku", "dataset": "nowhere.jsonl"}, ["dataset='nowhere.jsonl'", "no such file"]),
    (FileNotFoundError, {"denoiser": "nowhere"}, ["denoiser='nowhere'", "embedded", "config.json"]),
]


@pytest.mark.parametrize("kind, arguments, parts", BAD_ARGUMENTS)
def test_bad_argument(kind, arguments, parts, scripted, task):
    message = error_of(kind, UnmaskingEnv, **{"task": task, "denoiser": scripted} | arguments)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ({"autoreset_mode": "Never"}, ["autoreset_mode='Never'", "Disabled", "NextStep", "SameStep"]),
        ({"output": "jax"}, ["output='jax'", "numpy", "torch"]),
        ({"render_mode": "human"}, ["render_mode='human'", "ansi", "rgb_array"]),
    ],
)
def test_bad_vector_argument(arguments, parts, scripted, task):
    message = error_of(ValueError, UnmaskingVectorEnv, task, 2, denoiser=scripted, **arguments)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    "action, part",
    [
        (np.ones(3, dtype=np.int8), "shape (3,)"),
        (np.ones((1, 4), dtype=np.int8), "shape (1, 4)"),
        (1, "shape ()"),
        ([1, 0, 2, 0], "value 2"),
        ([-1, 0, 0, 0], "value -1"),
        ([0.5, 0.0, 1.0, 1.0], "value 0.5"),
        ([math.nan, 0.0, 1.0, 1.0], "value nan"),
        ("1010", "type str"),
        (None, "type NoneType"),
        ([[1], [0, 1]], "type list"),
    ],
)
def test_bad_action_is_refused_and_changes_nothing(action, part, scripted, task):
    env = gym.make("MaskedDiffusion-Sudoku-v0", task=task, denoiser=scripted, disable_env_checker=True)
    env.reset()
    message = error_of(ValueError, env.step, action)
    assert "action" in message and part in message and "must be (4,), bool or numbers 0 and 1" in message
    assert env.step(np.array([1, 0, 0, 0]))[-1]["tokens"].tolist() == [0, 5, 5, 5]


def test_step_needs_a_running_episode(scripted, task):
    env = gym.make("MaskedDiffusion-Sudoku-v0", task=task, denoiser=scripted)
    for run in (env, env.unwrapped):
        assert "reset" in error_of(gym.error.ResetNeeded, run.step, np.ones(4, dtype=np.int8))
    env.reset()
    assert env.step(np.ones(4, dtype=np.int8))[2]
    assert "call reset() first" in error_of(gym.error.ResetNeeded, env.step, np.ones(4, dtype=np.int8))


def test_render_needs_an_episode(scripted, task):
    env = UnmaskingEnv(task, denoiser=scripted, render_mode="ansi")
    assert "call reset() first" in error_of(gym.error.ResetNeeded, env.render)


@pytest.mark.parametrize("problem", [-1, 10_000])
def test_problem_out_of_range(problem, embedded):
    env = UnmaskingEnv("sudoku", denoiser=embedded, split="test")
    message = error_of(IndexError, env.reset, options={"problem": problem})
    assert f"problem {problem}: sudoku (embedded, test) has 0 to 9999" in message


def test_text_that_the_tokenizer_lacks_is_refused_with_the_words(embedded, tmp_path):
    path = tmp_path / "real.jsonl"
    path.write_text(json.dumps({"question": "how many zeppelins and quagmires are left ?", "answer": "7 #### 7"}))
    (tmp_path / "template.txt").write_text("{question}")
    given = {"denoiser": embedded, "dataset": str(path), "prompt_template": str(tmp_path / "template.txt")}
    message = error_of(ValueError, gym.make, "MaskedDiffusion-GSM8K-v0", **given)
    assert "'quagmires', 'zeppelins'" in message and "many" not in message.replace("quagmires", "")
    assert "dataset='embedded'" in message


@pytest.mark.parametrize(
    "lines, part",
    [
        (['{"Puzzle": "1200340000001234"}', '{"Puzzle": '], "line 2: not JSON"),
        (['{"Puzzle": "12"}'], "row 0: not a sudoku problem"),
        (['{"puzzle": "1200340000001234"}'], "a row needs `Puzzle`"),
        ([], "no rows"),
    ],
)
def test_broken_data_file(lines, part, embedded, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines))
    message = error_of(ValueError, UnmaskingEnv, "sudoku", denoiser=embedded, dataset=str(path))
    assert f"dataset={str(path)!r}" in message and part in message


def test_prompt_longer_than_the_context(embedded):
    message = error_of(ValueError, UnmaskingEnv, "countdown", denoiser=embedded, gen_length=embedded.context_length)
    assert f"gen_length={embedded.context_length}" in message and "prompt tokens" in message
    assert f"context of {embedded.context_length} tokens" in message


# Broken checkpoints


def rename_a_weight(weights: dict) -> None:
    weights["model.norm.scale"] = weights.pop("model.norm.weight")


def add_a_weight(weights: dict) -> None:
    weights["model.extra.weight"] = torch.zeros(2)


def cut_a_weight(weights: dict) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the embedded denoiser's folder."""
    return Path(shutil.copytree(EMBEDDED["embedded"], tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "change, parts",
    [
        (rename_a_weight, ["model.norm.scale", "model.norm.weight"]),
        (add_a_weight, ["model.extra.weight"]),
        (cut_a_weight, []),
    ],
)
def test_weights_that_do_not_fit(change, parts, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    message = error_of(ValueError, dllm_gym.load_denoiser, str(checkpoint))
    assert [part for part in (f"denoiser={str(checkpoint)!r}", *parts) if part not in message] == []


def test_truncated_weights(checkpoint):
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[: len(data) // 2])
    message = error_of(ValueError, dllm_gym.load_denoiser, str(checkpoint))
    assert f"denoiser={str(checkpoint)!r}" in message and "cannot be read" in message


@pytest.mark.parametrize("name, value", [("model_type", "llada"), ("is_causal", True)])
def test_checkpoint_of_another_kind(name, value, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text()) | {name: value}
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = error_of(ValueError, dllm_gym.load_denoiser, str(checkpoint))
    assert f"denoiser={str(checkpoint)!r}" in message and f"{name}={value!r}" in message
