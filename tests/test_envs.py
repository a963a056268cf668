"""The contract of every registered environment, of its forms and of its Stable-Baselines3 face."""

import copy
import itertools
import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from checkpoints import write_llada
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import RecordEpisodeStatistics, RecordVideo
from safetensors.torch import load_file, save_file
from scripted import ScriptedDenoiser, ScriptedTask
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.evaluation import evaluate_policy

import dllm_gym
from dllm_gym.denoisers.pretrained import EMBEDDED, load_denoiser
from dllm_gym.envs.sb3 import SB3VecEnv, make_sb3_env
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv

ROOT = Path(__file__).parents[1]
IDS = sorted(id for id in gym.registry if id.startswith("MaskedDiffusion-"))
FORMS = ("TopK", "Threshold", "Position")
SET_IDS = [id for id in IDS if not id.endswith(tuple(f"-{form}-v0" for form in FORMS))]


BENCHMARK_ROWS = {
    "math500": {"problem": "What is $1/2$?", "answer": "0.5"},
    "aime24": {"problem": "What is 1 + 1?", "answer": "2"},
    "aime25": {"problem": "What is 2 + 2?", "answer": "4"},
    "humaneval": {
        "prompt": "def f():\n    'Return 1.'\n",
        "entry_point": "f",
        "test": "def check(f):\n    assert f() == 1\n",
    },
    "mbpp": {"text": "Write a function f that returns 1.", "test_list": ["assert f() == 1"]},
}
"""Tasks without embedded problems are played on two rows of a file, by a tiny denoiser that reads any text."""


@pytest.fixture(scope="session")
def arguments_of(embedded, tmp_path_factory):
    """What an id needs: a denoiser, and data where it has no embedded problems."""
    folder = tmp_path_factory.mktemp("benchmarks")
    reader = load_denoiser(write_llada(folder / "checkpoint"), "cpu")

    def arguments(id: str) -> dict:
        task = gym.spec(id).kwargs["task"]
        if task not in BENCHMARK_ROWS:
            return {"denoiser": embedded}
        file = folder / f"{task}.jsonl"
        file.write_text(f"{json.dumps(BENCHMARK_ROWS[task])}\n" * 2)
        return {"denoiser": reader, "dataset": str(file), "gen_length": 12, "allow_code_execution": True}

    return arguments


def walk(env: gym.Env, seed: int, steps: int = 12):
    """What an environment returns, call by call, over some random steps and through the ends of episodes."""
    env.action_space.seed(seed)
    yield env.reset(seed=seed)
    for _ in range(steps):
        returned = env.step(env.action_space.sample())
        yield returned
        if returned[2]:
            yield env.reset()


def arrays_in(returned) -> list[np.ndarray]:
    if isinstance(returned, dict | tuple):
        values = returned.values() if isinstance(returned, dict) else returned
        return [array for value in values for array in arrays_in(value)]
    return [returned] if isinstance(returned, np.ndarray) else []


def error_of(kind: type[Exception], function, *args, **kwargs) -> str:
    """The message of the error that a call raises, one line."""
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


# The registry


def test_the_registry_has_every_task_in_every_form():
    tasks = "GSM8K MATH500 AIME24 AIME25 HumanEval MBPP Countdown Sudoku Oracle".split()
    assert set(IDS) == {f"MaskedDiffusion-{t}{form}-v0" for t in tasks for form in ("", *(f"-{f}" for f in FORMS))}


def test_importing_and_registering_loads_no_model_library():
    code = "import sys, gymnasium, dllm_gym; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_make_imports_the_module_that_the_id_names():
    done = run_python(
        "import gymnasium; print(gymnasium.make('dllm_gym:MaskedDiffusion-GSM8K-v0').reset()[1]['problem_id'])"
    )
    assert done.stdout.startswith("gsm8k/embedded/train/"), done.stderr


@pytest.mark.parametrize("id", IDS)
def test_gymnasium_checker(id, arguments_of):
    env = gym.make(id, **arguments_of(id), disable_env_checker=True)
    env = env.unwrapped if id in SET_IDS else env
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env)
    # The forms are wrappers: the checker would rather see what is below them.
    assert [str(w.message) for w in caught if "different from the unwrapped version" not in str(w.message)] == []


@pytest.mark.parametrize("id", IDS)
def test_sb3_checker(id, arguments_of):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sb3_check_env(gym.make(id, **arguments_of(id)))
    # confidence is a table, and the threshold's natural range is [0, 1]; both work, as PPO below shows.
    allowed = "Your observation confidence has an unconventional shape", "symmetric and normalized Box action space"
    assert [str(w.message) for w in caught if not any(text in str(w.message) for text in allowed)] == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("id", IDS)
def test_same_seed_same_rollout(id, temperature, arguments_of):
    first, second, third = (gym.make(id, **arguments_of(id), temperature=temperature) for _ in range(3))
    returned = list(walk(first, seed=5))
    assert data_equivalence(returned, list(walk(second, seed=5)), exact=True)
    assert not data_equivalence(returned, list(walk(third, seed=6)), exact=True)


@pytest.mark.parametrize("id", SET_IDS)
def test_every_step_keeps_the_contract(id, arguments_of):
    given = arguments_of(id)
    env = gym.make(id, **given, block_length=4, observe=("confidence", "entropy", "token"), confidence_k=3)
    length = env.action_space.n
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    assert info["dataset"] == given.get("dataset", "embedded")
    assert observation["masked"].all() and not info["unmasked"].any()
    for step in range(1, length + 1):
        before = observation, info["tokens"]
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample() * (step % 2))
        assert observation in env.observation_space
        masked, eligible = observation["masked"].astype(bool), observation["eligible"].astype(bool)
        assert (masked == (info["tokens"] == given["denoiser"].mask_token_id)).all()
        assert (info["unmasked"] == (before[0]["masked"].astype(bool) & ~masked)).all() and info["unmasked"].any()
        assert (info["tokens"] == before[1])[~info["unmasked"]].all()
        first = masked.argmax() // 4 * 4
        assert (eligible == masked & (np.arange(length) // 4 * 4 == first)).all()
        assert (observation["confidence"][~masked] == 0).all() and (observation["confidence"][masked, 0] > 0).all()
        assert observation["progress"][0] == np.float32(step / length)
        assert terminated == (not masked.any()) and not truncated
        if terminated:
            break
        assert reward == 0 and "score" not in info
    assert info["nfe"] == step and not info["step_limit"]
    assert reward == pytest.approx(info["score"] * (length - step + 1) / length)


@pytest.mark.parametrize("id", IDS)
def test_returned_arrays_belong_to_the_caller(id, arguments_of):
    env, twin = (gym.make(id, **arguments_of(id)) for _ in range(2))
    kept, copies = [], []
    for mine, theirs in zip(walk(env, seed=0), walk(twin, seed=0), strict=True):
        assert data_equivalence(mine, theirs, exact=True)
        kept.append(mine)
        copies.append(copy.deepcopy(mine))
        for array in arrays_in(theirs):
            array[...] = 1
    assert data_equivalence(kept, copies, exact=True)


# Arguments, seeds and options


def test_the_denoiser_is_shared_and_never_copied(arguments_of):
    for id in IDS:
        given = arguments_of(id)
        env = gym.make(id, **given)
        assert copy.deepcopy(env.spec).kwargs["denoiser"] is given["denoiser"]
        assert env.spec.make().unwrapped.episodes.denoiser is given["denoiser"]


def test_options_choose_the_problem(scripted, task):
    env = gym.make("MaskedDiffusion-Sudoku-v0", task=task, denoiser=scripted)
    _, info = env.reset(options={"problem": 2})
    assert (info["problem_id"], info["prompt"]) == ("scripted/2", "a a a")
    assert len({env.reset(seed=seed)[1]["problem_id"] for seed in range(20)}) == 3


@pytest.mark.parametrize(
    "settings, reward",
    [
        ({}, 0.75),
        ({"alpha": 2.0}, 0.75**2),
        ({"reward": "additive", "alpha": 0.5}, 1 - 0.5 * 2 / 4),
        ({"reward": lambda score, nfe, length, alpha: 100 * score + 10 * nfe + length}, 124.0),
    ],
)
def test_reward_of_a_right_answer_in_two_of_four_steps(settings, reward, scripted, task):
    env = gym.make("MaskedDiffusion-Sudoku-v0", task=task, denoiser=scripted, **settings)
    env.reset(options={"problem": 0})
    assert env.step(np.array([1, 1, 0, 0]))[1:4] == (0.0, False, False)
    observation, *result, info = env.step(np.array([0, 0, 1, 1]))
    assert result == [pytest.approx(reward), True, False]
    assert info["completion"] == "a b c d" and info["score"] == 1 and info["correct"] is True
    assert info["nfe"] == 2 and info["problem_id"] == "scripted/0" and info["step_limit"] is False
    assert not observation["confidence"].any() and observation["progress"] == 0.5


@pytest.mark.parametrize("settings, reward", [({}, 0.0), ({"reward": "additive"}, -0.5)])
def test_the_step_limit_ends_with_score_0_and_is_no_truncation(settings, reward, scripted, task):
    env = gym.make("MaskedDiffusion-Sudoku-v0", task=task, denoiser=scripted, max_steps=2, **settings)
    env.reset(options={"problem": 0})
    env.step(np.array([1, 1, 0, 0]))
    _, *result, info = env.step(np.array([0, 0, 1, 0]))
    assert result == [reward, True, False]
    assert info["step_limit"] is True and info["score"] == 0 and info["correct"] is False and info["nfe"] == 2


@pytest.mark.parametrize("empty_action, unmasked", [("best", [1, 0, 0, 0]), ("noop", [0, 0, 0, 0])])
def test_empty_action(empty_action, unmasked, scripted, task):
    env = gym.make("MaskedDiffusion-Sudoku-v0", task=task, denoiser=scripted, empty_action=empty_action)
    env.reset()
    observation, *_, info = env.step(np.zeros(4, dtype=np.int8))
    assert info["unmasked"].tolist() == unmasked and observation["progress"] == 0.25


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
@pytest.mark.parametrize("numbers", [[True, False, False, True], [1, 0, 0, 1], [1.0, 0.0, 0.0, 1.0]])
def test_forms_of_an_action(form, numbers, scripted, task):
    env = UnmaskingEnv(task, denoiser=scripted)
    env.reset()
    assert env.step(form(numbers))[-1]["unmasked"].tolist() == [True, False, False, True]


# Rendering and Gymnasium's wrappers


@pytest.mark.parametrize("id", ["MaskedDiffusion-Countdown-v0", "MaskedDiffusion-Countdown-TopK-v0"])
def test_render_modes(id, embedded, capsys):
    pictures = gym.make(id, denoiser=embedded, render_mode="rgb_array")
    frames = [pictures.render() for _ in walk(pictures, seed=0, steps=3)]
    assert {frame.dtype for frame in frames} == {np.dtype(np.uint8)}
    assert len({frame.shape for frame in frames}) == 1 and frames[0].shape[2:] == (3,)
    assert all((before != after).any() for before, after in itertools.pairwise(frames))

    text = gym.make(id, denoiser=embedded, render_mode="ansi")
    texts = [text.render() for _ in walk(text, seed=0, steps=3)]
    assert len(set(texts)) == len(texts) and all(isinstance(text, str) for text in texts)
    assert capsys.readouterr().out == ""

    list(walk(gym.make(id, denoiser=embedded, render_mode="human"), seed=0, steps=3))
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts)


@pytest.mark.parametrize("id", ["MaskedDiffusion-Countdown-v0", "MaskedDiffusion-Countdown-TopK-v0"])
def test_render_mode_that_collects_frames(id, embedded):
    env = gym.make(id, denoiser=embedded, render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert len(env.render()) == 2


def test_record_video(embedded, tmp_path):
    moviepy = pytest.importorskip("moviepy")
    env = gym.make("MaskedDiffusion-Countdown-TopK-v0", denoiser=embedded, render_mode="rgb_array")
    env = RecordVideo(env, tmp_path / "videos", episode_trigger=lambda episode: True)
    env.reset(seed=0)
    steps = 1
    while not env.step(4)[2]:
        steps += 1
    env.close()
    with moviepy.VideoFileClip(str(next(tmp_path.glob("videos/*.mp4")))) as clip:
        assert clip.n_frames == steps + 1


@pytest.mark.parametrize("form", ["", "-TopK"])
def test_record_episode_statistics(form, embedded):
    env = RecordEpisodeStatistics(gym.make(f"MaskedDiffusion-Sudoku{form}-v0", denoiser=embedded))
    ends = [returned for returned in walk(env, seed=0) if len(returned) == 5 and returned[2]]
    assert ends
    for _, reward, *_, info in ends:
        assert info["episode"]["r"] == pytest.approx(reward) and info["episode"]["l"] == info["nfe"]


@pytest.mark.parametrize("id", IDS)
def test_sync_vector_environment_shares_the_denoiser(id, arguments_of):
    given = arguments_of(id)
    env = gym.make_vec(id, num_envs=2, vectorization_mode="sync", **given)
    assert all(row.unwrapped.episodes.denoiser is given["denoiser"] for row in env.envs)
    observations, _ = env.reset(seed=3)
    single, _ = gym.make(id, **given).reset(seed=4)
    second = {name: array[1] for name, array in observations.items()} if id in SET_IDS else observations[1]
    assert data_equivalence(second, single, exact=True)
    assert env.step(env.action_space.sample())[0] in env.observation_space


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


# Other forms of action and observation


@pytest.fixture
def make_form(scripted, task):
    """Make the environment of a form on the scripted denoiser, whose order of confidence is 0, 2, 3, 1."""

    def make(form: str, **settings) -> gym.Env:
        env = gym.make(f"MaskedDiffusion-Sudoku-{form}-v0", task=task, denoiser=scripted, **settings)
        env.reset(options={"problem": 0})
        return env

    return make


def unmasked_by(env: gym.Env, action) -> list[int]:
    return np.flatnonzero(env.step(action)[-1]["unmasked"]).tolist()


@pytest.mark.parametrize("action, unmasked", [(0, [0]), (1, [0, 2]), (2, [0, 2, 3]), (3, [0, 1, 2, 3])])
def test_topk_unmasks_the_most_confident(action, unmasked, make_form):
    assert unmasked_by(make_form("TopK"), action) == unmasked


def test_topk_chooses_among_the_eligible(make_form):
    env = make_form("TopK", block_length=2)
    assert unmasked_by(env, 1) == [0, 1]
    assert unmasked_by(env, 3) == [2, 3]


@pytest.mark.parametrize("settings, most", [({}, 8), ({"gen_length": 4}, 4), ({"max_unmask": 12}, 12)])
def test_topk_size(settings, most, embedded):
    env = gym.make("MaskedDiffusion-Sudoku-TopK-v0", denoiser=embedded, **settings)
    assert env.action_space == gym.spaces.Discrete(most)
    assert env.spec.make().action_space == env.action_space


@pytest.mark.parametrize(
    "threshold, unmasked",
    [(0.65, [0, 2, 3]), (0.75, [0, 2]), (0.95, [0]), (0.0, [0, 1, 2, 3]), (-3.0, [0, 1, 2, 3]), (7.0, [0])],
)
def test_threshold_unmasks_the_more_confident_and_at_least_one(threshold, unmasked, make_form):
    assert unmasked_by(make_form("Threshold", empty_action="noop"), np.array([threshold], dtype=np.float32)) == unmasked


def test_threshold_unmasks_one_of_equals():
    flat = ScriptedDenoiser([[0.5, 0.5]] * 4)
    env = gym.make("MaskedDiffusion-Sudoku-Threshold-v0", task=ScriptedTask(), denoiser=flat)
    env.reset()
    assert len(unmasked_by(env, np.ones(1, dtype=np.float32))) == 1


def test_position_unmasks_one_and_shows_what_is_eligible(make_form):
    env = make_form("Position", block_length=2)
    _, info = env.reset(options={"problem": 0})
    masks, unmasked = [info["action_mask"]], []
    for action in (1, 0, 2, 3):
        *_, info = env.step(action)
        masks.append(info["action_mask"])
        unmasked.append(np.flatnonzero(info["unmasked"]).tolist())
    assert unmasked == [[1], [0], [2], [3]]
    assert [mask.tolist() for mask in masks] == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert all(mask.dtype == np.int8 for mask in masks)


@pytest.mark.parametrize("empty_action, unmasked", [("best", [0]), ("noop", [])])
def test_position_that_is_not_eligible_is_an_empty_set(empty_action, unmasked, make_form):
    env = make_form("Position", block_length=2, empty_action=empty_action)
    assert unmasked_by(env, 3) == unmasked


def test_flat_observation_is_the_dict_in_alphabetical_order(make_form, scripted, task):
    settings = {"observe": ("token", "entropy", "confidence"), "confidence_k": 2}
    flat = make_form("TopK", **settings)
    plain = UnmaskingEnv(task, denoiser=scripted, **settings)
    plain.reset(options={"problem": 0})
    observation = flat.step(1)[0]
    wanted = plain.step(np.array([1, 0, 1, 0]))[0]
    assert observation.dtype == np.float32 and observation in flat.observation_space
    assert observation.tolist() == [number for name in sorted(wanted) for number in wanted[name].ravel().tolist()]


@pytest.mark.parametrize(
    "form, action",
    [
        ("TopK", 4),
        ("TopK", -1),
        ("TopK", 1.0),
        ("TopK", None),
        ("Position", 4),
        ("Position", np.array([1])),
        ("Threshold", np.array([math.nan])),
        ("Threshold", 0.5),
        ("Threshold", np.ones(2)),
    ],
)
def test_bad_action_of_a_form(form, action, make_form):
    env = make_form(form, disable_env_checker=True)
    assert f"must be in {env.action_space}" in error_of(ValueError, env.step, action)


@pytest.mark.parametrize("max_unmask", [0, 5])
def test_bad_max_unmask(max_unmask, make_form):
    message = error_of(ValueError, make_form, "TopK", max_unmask=max_unmask)
    assert f"max_unmask={max_unmask}" in message and "gen_length=4" in message


def test_max_unmask_belongs_to_topk(make_form):
    assert "max_unmask" in error_of(TypeError, make_form, "Position", max_unmask=2)


# Stable-Baselines3


@pytest.fixture
def rows(scripted, task) -> SB3VecEnv:
    """Three rows on the scripted denoiser, all at problem 0."""
    env = SB3VecEnv(UnmaskingVectorEnv(task, 3, denoiser=scripted, max_steps=2))
    env.set_options({"problem": 0})
    env.reset()
    return env


def test_sb3_end_of_an_episode(rows):
    observation, rewards, dones, infos = rows.step(np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]))
    assert dones.tolist() == [True, False, False] and rewards.tolist() == [1.0, 0.0, 0.0]
    assert observation["masked"].sum(axis=1).tolist() == [4, 3, 3] and observation["progress"][0] == 0
    assert infos[1] == infos[2] == {"TimeLimit.truncated": False}
    end = infos[0]
    assert not end["terminal_observation"]["masked"].any() and end["terminal_observation"]["progress"] == 0.25
    assert (end["completion"], end["score"], end["correct"], end["nfe"]) == ("a b c d", 1.0, True, 1)
    assert (end["problem_id"], end["step_limit"]) == ("scripted/0", False)
    assert (end["episode"]["r"], end["episode"]["l"]) == (1.0, 1) and end["episode"]["t"] >= 0
    assert rows.reset_infos[0]["problem_id"].startswith("scripted/") and "score" not in rows.reset_infos[0]
    assert json.loads(json.dumps({key: end[key] for key in ("score", "correct", "nfe", "episode")}))["correct"] is True

    observation, rewards, dones, infos = rows.step(np.zeros((3, 4), dtype=np.int8))
    assert dones.tolist() == [False, True, True] and rewards.tolist() == [0.0, 0.0, 0.0]
    for end in infos[1:]:
        assert end["step_limit"] is True and end["TimeLimit.truncated"] is False and end["episode"]["l"] == 2
        assert end["terminal_observation"]["masked"].sum() == 2


def test_sb3_decodes_all_rows_in_one_forward(rows, scripted):
    scripted.calls.clear()
    for _ in range(5):
        rows.step(np.zeros((3, 4), dtype=np.int8))
    assert scripted.calls == [3] * 5


def test_sb3_seeds_and_options_count_for_one_reset(rows):
    def problems() -> list[tuple]:
        seen = []
        for _ in range(8):
            rows.reset()
            seen.append(tuple(info["problem_id"] for info in rows.reset_infos))
        return seen

    rows.seed(3)
    rows.set_options([{"problem": 2}, {"problem": 1}, {}])
    first = problems()
    assert first[0][:2] == ("scripted/2", "scripted/1") and len(set(first)) > 2
    rows.seed(3)
    assert problems() != first
    rows.seed(3)
    rows.set_options([{"problem": 2}, {"problem": 1}, {}])
    assert problems() == first


def test_sb3_rows_equal_single_environments(scripted, task):
    rows = SB3VecEnv(UnmaskingVectorEnv(task, 3, denoiser=scripted, temperature=1.0))
    rows.seed(7)
    observation = rows.reset()
    singles = [UnmaskingEnv(task, denoiser=scripted, temperature=1.0) for _ in range(3)]
    wanted = [env.reset(seed=7 + row)[0] for row, env in enumerate(singles)]
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(20):
        for row in range(3):
            assert data_equivalence({name: array[row] for name, array in observation.items()}, wanted[row], exact=True)
        actions = rng.integers(2, size=(3, 4))
        observation, rewards, dones, infos = rows.step(actions)
        for row, env in enumerate(singles):
            wanted[row], reward, terminated, _, info = env.step(actions[row])
            assert (rewards[row], dones[row]) == (np.float32(reward), terminated)
            if terminated:
                ends += 1
                assert data_equivalence(infos[row]["terminal_observation"], wanted[row], exact=True)
                assert {key: infos[row][key] for key in ("completion", "score", "problem_id", "nfe")}.items() <= {
                    key: value for key, value in info.items() if not isinstance(value, np.ndarray)
                }.items()
                wanted[row], _ = env.reset()
    assert ends > 5


def test_stock_ppo_learns_and_its_logs_fill(scripted, task):
    env = make_sb3_env("MaskedDiffusion-Sudoku-v0", num_envs=2, seed=0, task=task, denoiser=scripted)
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu", seed=0)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(32)
    assert any((old != new).any() for old, new in zip(before, model.policy.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    assert len(model.ep_info_buffer) > 0 and all(1 <= episode["l"] <= 4 for episode in model.ep_info_buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert len(rewards) == 4 and all(1 <= length <= 4 for length in lengths)


@pytest.mark.parametrize("id", ["MaskedDiffusion-Sudoku-v0"] + [f"MaskedDiffusion-Sudoku-{form}-v0" for form in FORMS])
def test_stock_ppo_takes_an_id(id, scripted, task):
    policy = "MultiInputPolicy" if id in SET_IDS else "MlpPolicy"
    model = PPO(policy, gym.make(id, task=task, denoiser=scripted), n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    model.learn(16)
    assert len(model.ep_info_buffer) > 0


def test_sb3_attributes_and_rendering(scripted, task):
    env = SB3VecEnv(UnmaskingVectorEnv(task, 2, denoiser=scripted, render_mode="rgb_array"))
    env.reset()
    single, both = env.get_images()[0].shape, env.render().shape
    assert both[0] * both[1] == 2 * single[0] * single[1]
    env.set_attr("note", "kept")
    assert env.get_attr("note") == ["kept", "kept"] and env.get_attr("note", indices=[1]) == ["kept"]
    assert len(env.env_method("render", indices=0)) == 1
    text = SB3VecEnv(UnmaskingVectorEnv(task, 2, denoiser=scripted, render_mode="ansi"))
    text.reset()
    assert text.render().count("4 of 4 masked") == 2


def test_sb3_refuses_other_environments(scripted, task):
    for settings in ({"autoreset_mode": "Disabled"}, {"output": "torch"}):
        message = error_of(ValueError, SB3VecEnv, UnmaskingVectorEnv(task, 2, denoiser=scripted, **settings))
        assert next(iter(settings)) in message and "must be 'SameStep' and 'numpy'" in message
    message = error_of(TypeError, make_sb3_env, "MaskedDiffusion-Sudoku-TopK-v0", 2, task=task, denoiser=scripted)
    assert "make_vec_env" in message
