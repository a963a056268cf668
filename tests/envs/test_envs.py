"""The contract of every registered environment: Gymnasium's checks, seeds, options, rendering."""

import copy
import itertools
import json
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
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.envs.unmasking import UnmaskingEnv

ROOT = Path(__file__).parents[2]
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


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


# The registry


def test_the_registry_has_every_task_in_every_form():
    tasks = "GSM8K MATH500 AIME24 AIME25 HumanEval MBPP Countdown Sudoku Mixture Oracle".split()
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
