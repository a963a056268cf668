"""How names and keyword arguments may be spelt, and which one an error says is near."""

import functools

import gymnasium as gym
import pytest
from errors import error_of

from dllm_gym import make_task
from dllm_gym.agents import make_policy
from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.agents.samplers.spec import is_random, make_sampler
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.eval.evaluate import CellConfig, evaluate_cell
from dllm_gym.names import find
from dllm_gym.registration import IDS
from dllm_gym.rewards import get_reward, multiplicative
from dllm_gym.tasks import TASKS
from dllm_gym.tasks.gsm8k import GSM8K

SUDOKU, TOPK = "MaskedDiffusion-Sudoku-v0", "MaskedDiffusion-Sudoku-TopK-v0"


@pytest.mark.parametrize("name", sorted(IDS.keys() - {"Mixture"}))
def test_the_name_in_an_id_is_the_tasks(name):
    assert find(name, TASKS, "task") == IDS[name]["task"]


def test_names_in_any_case(scripted, task):
    assert isinstance(make_task("GSM8K"), GSM8K)
    assert UnmaskingEnv("SUDOKU").episodes.task.name == "sudoku"
    assert make_sampler("Left-to-Right:k=2") == make_policy("LEFT-TO-RIGHT", k=2) == make_policy("left-to-right", k=2)
    assert is_random("Random") and not is_random("Threshold:threshold=0.9")
    assert (
        isinstance(make_sampler("Metropolis:steps=2"), Metropolis)
        and Metropolis(proposal="Margin").proposal == "margin"
    )
    assert get_reward("Multiplicative") is multiplicative
    assert UnmaskingEnv(task, denoiser=scripted, reward="ADDITIVE").episodes.reward(1.0, 2, 4, 0.5) == 0.75
    assert make_env(EnvConfig(id="maskeddiffusion-countdown-v0", num_envs=1)).episodes.task.name == "countdown"


def test_a_cell_is_the_same_in_any_case():
    env, other = EnvConfig("MaskedDiffusion-Countdown-v0"), EnvConfig("maskeddiffusion-COUNTDOWN-v0")
    other.reward = "Multiplicative"
    cells = [
        evaluate_cell(CellConfig(sampler, env, problems=1, films=0))
        for sampler, env in (("threshold:threshold=0.5", env), ("Threshold:threshold=0.5", other))
    ]
    assert cells[0].key == cells[1].key and cells[0].settings == cells[1].settings


@pytest.mark.parametrize(
    "make, named",
    [
        (functools.partial(make_task, "GSM8"), ["task='GSM8'", "'countdown'", "Did you mean 'gsm8k'?"]),
        (functools.partial(make_policy, "Treshold"), ["policy='Treshold'", "'random'", "Did you mean 'threshold'?"]),
        (functools.partial(make_sampler, "metropols"), ["sampler='metropols'", "folder", "Did you mean 'metropolis'?"]),
        (
            functools.partial(get_reward, "Aditive"),
            ["reward='Aditive'", "'multiplicative'", "Did you mean 'additive'?"],
        ),
        (functools.partial(make_env, EnvConfig("Countdown")), ["env.id='Countdown'", "MaskedDiffusion-Countdown-v0"]),
        (functools.partial(make_env, EnvConfig(TOPK)), [f"env.id='{TOPK}'", "set of positions", f"mean '{SUDOKU}'?"]),
        (functools.partial(make_policy, "threshold", treshold=0.5), ["not take treshold", "Did you mean 'threshold'?"]),
        (functools.partial(make_sampler, "metropolis:step=3"), ["does not take step;", "Did you mean 'steps'?"]),
    ],
)
def test_the_near_name(make, named):
    message = error_of(ValueError, make)
    assert [part for part in named if part not in message] == []


def test_no_name_is_near():
    assert "Did you mean" not in error_of(ValueError, make_task, "chess")
    assert "Did you mean" not in error_of(ValueError, make_task, None)


@pytest.mark.parametrize(
    "make, given, near",
    [
        (functools.partial(gym.make, SUDOKU), {"temprature": 1.0}, "temperature"),
        (functools.partial(gym.make, TOPK), {"max_unmsk": 2}, "max_unmask"),
        (functools.partial(gym.make_vec, SUDOKU, num_envs=2), {"max_episode_steps": 5}, "max_steps"),
        (functools.partial(gym.make_vec, TOPK, num_envs=2), {"max_episode_steps": 5}, "max_steps"),
        (functools.partial(gym.make_vec, TOPK, num_envs=2), {"max_unmsk": 2}, "max_unmask"),
        (functools.partial(gym.make_vec, SUDOKU), {"num_env": 2}, "num_envs"),
        (functools.partial(UnmaskingVectorEnv, "sudoku"), {"autoreset": "Disabled"}, "autoreset_mode"),
        (functools.partial(UnmaskingEnv, "sudoku"), {"Observe": ("token",)}, "observe"),
        (functools.partial(make_task, "gsm8k"), {"few_shots": 2}, "few_shot"),
        (functools.partial(make_task, "gsm8k"), {"spilt": "test"}, "split"),
        (functools.partial(make_task, "oracle"), {"sentence": {}}, "sentences"),
        (functools.partial(GSM8K, "embedded"), {"promt_template": "x.txt"}, "prompt_template"),
    ],
)
def test_the_near_argument(make, given, near):
    """In public words: no class of ours is named that a user did not call."""
    ((name, value),) = given.items()
    message = error_of(TypeError, make, **given)
    assert f"unexpected keyword argument {name!r}, with the value {value!r}" in message
    assert f"Did you mean {near!r}?" in message and "__init__" not in message


def test_no_argument_is_near():
    for form, also in {SUDOKU: "temperature", TOPK: "max_unmask"}.items():
        message = error_of(TypeError, gym.make, form, colour="red")
        assert "must be one of" in message and also in message and "num_rows" not in message


@pytest.mark.parametrize("name", ["num_rows", "length", "form"])
def test_what_only_the_insides_take_is_no_argument(name):
    """The rows of `Episodes`, the length that a form's space is made of, the form that the id sets."""
    assert f"unexpected keyword argument {name!r}" in error_of(TypeError, UnmaskingEnv, "sudoku", **{name: 3})
