"""The forms of the environments with other actions and observations, and their Stable-Baselines3 face."""

import json
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
from errors import error_of
from gymnasium.utils.env_checker import data_equivalence
from scripted import ScriptedDenoiser, ScriptedTask
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from dllm_gym.envs.sb3 import SB3VecEnv, make_sb3_env
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv

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


@pytest.mark.parametrize(
    "id",
    ["MaskedDiffusion-Sudoku-v0"] + [f"MaskedDiffusion-Sudoku-{form}-v0" for form in ("TopK", "Threshold", "Position")],
)
def test_stock_ppo_takes_an_id(id, scripted, task):
    policy = "MultiInputPolicy" if id == "MaskedDiffusion-Sudoku-v0" else "MlpPolicy"
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
    assert "make_vec_env" in error_of(TypeError, make_sb3_env, "CartPole-v1", 2)


@pytest.mark.parametrize(
    "form, actions", [("TopK", [0, 3, 1]), ("Threshold", [[0.0], [0.7], [1.0]]), ("Position", [1, 0, 3])]
)
def test_sb3_decodes_all_rows_of_a_form_in_one_forward(form, actions, scripted, task):
    """And each row is what SB3's own way to make many environments has there."""
    id, settings = f"MaskedDiffusion-Sudoku-{form}-v0", {"task": task, "denoiser": scripted, "max_steps": 3}
    mine = make_sb3_env(id, num_envs=3, seed=5, **settings)
    theirs = make_vec_env(id, n_envs=3, seed=5, env_kwargs=settings)
    assert (mine.observation_space, mine.action_space) == (theirs.observation_space, theirs.action_space)
    assert np.array_equal(mine.reset(), theirs.reset())
    for _ in range(6):
        scripted.calls.clear()
        observation, rewards, dones, infos = mine.step(np.array(actions))
        assert scripted.calls == [3]
        wanted, their_rewards, their_dones, their_infos = theirs.step(np.array(actions))
        assert np.array_equal(observation, wanted) and np.array_equal(dones, their_dones)
        assert np.array_equal(rewards, their_rewards)
        for row in np.flatnonzero(dones):
            assert np.array_equal(infos[row]["terminal_observation"], their_infos[row]["terminal_observation"])
            assert all(infos[row][key] == their_infos[row][key] for key in ("completion", "nfe", "problem_id"))
            assert infos[row]["episode"]["l"] == their_infos[row]["episode"]["l"]


# Masks of actions, for sb3-contrib's MaskablePPO: `has_attr("action_masks")`, and `env_method` stacked


def test_position_has_the_masks_of_its_actions(make_form):
    env = make_form("Position", block_length=2)
    masks = [env.get_wrapper_attr("action_masks")()]
    for action in (1, 0):
        *_, info = env.step(action)
        masks.append(env.get_wrapper_attr("action_masks")())
    assert [mask.tolist() for mask in masks] == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]
    assert all(mask.dtype == bool for mask in masks) and np.array_equal(masks[-1], info["action_mask"])
    assert not make_form("TopK").has_wrapper_attr("action_masks")


@pytest.mark.parametrize("make", [make_sb3_env, make_vec_env], ids=["one forward", "copies"])
def test_position_has_the_masks_of_all_rows(make, scripted, task):
    settings = {"task": task, "denoiser": scripted, "block_length": 2}
    settings = settings if make is make_sb3_env else {"env_kwargs": settings}
    env = make("MaskedDiffusion-Sudoku-Position-v0", 3, seed=0, **settings)
    env.reset()
    assert env.has_attr("action_masks")
    env.step(np.array([1, 0, 3]))  # 3 is not eligible: the best, 0, instead
    masks = np.stack(env.env_method("action_masks"))
    assert masks.dtype == bool and masks.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert np.stack(env.env_method("action_masks", indices=[1])).tolist() == [[0, 1, 0, 0]]
    env.step(np.array([0, 1, 1]))  # the second block
    assert np.stack(env.env_method("action_masks")).tolist() == [[0, 0, 1, 1]] * 3
    topk = make("MaskedDiffusion-Sudoku-TopK-v0", 3, **settings)
    assert not topk.has_attr("action_masks")


@pytest.mark.parametrize("native", [True, False])
def test_maskable_ppo_chooses_what_is_eligible(native, scripted, task):
    contrib = pytest.importorskip("sb3_contrib")
    id, settings = "MaskedDiffusion-Sudoku-Position-v0", {"task": task, "denoiser": scripted, "empty_action": "noop"}
    env = make_sb3_env(id, 2, seed=0, **settings) if native else gym.make(id, **settings)
    model = contrib.MaskablePPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0)
    model.learn(64)
    assert {episode["l"] for episode in model.ep_info_buffer} == {4}  # no step was lost on an unmasked position


# Actions of many rows


@pytest.mark.parametrize(
    "form, actions, part",
    [
        ("TopK", [0, 1], "actions of shape (2,)"),
        ("TopK", 1, "actions of shape ()"),
        ("TopK", [0, 1, 4], "action=np.int64(4)"),
        ("TopK", [[0], [1], [2]], "action=array([0])"),
        ("TopK", [0.0, 1.0, 2.0], "action=np.float64(0.0)"),
        ("Position", [0, -1, 2], "action=np.int64(-1)"),
        ("Threshold", [0.1, 0.2, 0.3], "action=np.float64(0.1)"),
        ("Threshold", [[0.1], [math.nan], [0.3]], "action=array([nan])"),
    ],
)
def test_bad_actions_of_a_form(form, actions, part, scripted, task):
    env = gym.make_vec(f"MaskedDiffusion-Sudoku-{form}-v0", num_envs=3, task=task, denoiser=scripted)
    env.reset()
    message = error_of(ValueError, env.step, np.array(actions))
    assert part in message and f"in {env.single_action_space}" in message
    assert env.step(env.action_space.sample())[4]["_tokens"].all()
