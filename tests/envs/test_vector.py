"""The vector environment against single environments and Gymnasium's own, and `collect`, which drives its rows."""

import copy
import functools
import pickle
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from scripted import MASK, ScriptedDenoiser, ScriptedTask

from dllm_gym import load_denoiser
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.samplers.rollout import collect, play
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.types import Rollout

MODES = ("SameStep", "NextStep", "Disabled")


@pytest.fixture(scope="module")
def denoiser():
    return load_denoiser("embedded", device="cpu", dtype="float32")


@pytest.fixture
def moody() -> ScriptedDenoiser:
    """Each written token moves mass to the letter after it; later positions are surer."""
    sureness = torch.tensor([0.7, 0.9, 1.1, 1.3])[:, None]

    def table(tokens):
        weights = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5]).repeat(*tokens.shape, 1)
        for letter in range(4):
            weights[..., letter] += 5 * (tokens == letter).sum(dim=1, keepdim=True)
        weights = weights.roll(1, dims=-1) ** sureness
        return weights / weights.sum(dim=-1, keepdim=True)

    return ScriptedDenoiser(table, length=4)


def threshold(observation, at: float = 0.6) -> np.ndarray:
    return (observation["confidence"][..., 0] > at).astype(np.int8)


def row_of(infos: dict, row: int) -> dict:
    """What vector infos say of one row."""
    return {
        key: row_of(value, row) if isinstance(value, dict) else value[row]
        for key, value in infos.items()
        if not key.startswith("_") and infos[f"_{key}"][row]
    }


def same(mine, theirs, tolerance: float = 1e-5) -> bool:
    """Equal, floats within the tolerance, relative for those above 1 (a log-likelihood is a sum of many)."""
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key], tolerance) for key in mine)
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    if np.issubdtype(mine.dtype, np.floating):
        return mine.shape == theirs.shape and bool(np.allclose(mine, theirs, rtol=tolerance, atol=tolerance))
    return bool(np.array_equal(mine, theirs))


# Rows and single environments


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("settings", [{"task": "countdown"}, {"task": "sudoku", "block_length": 4}], ids=str)
@pytest.mark.parametrize("num_envs", [1, 4, 16])
def test_a_row_equals_the_single_environment_of_its_seed(num_envs, settings, temperature, denoiser):
    """Within the rounding of float32, which a position at which the denoiser is ill-conditioned amplifies."""
    settings = {**settings, "denoiser": denoiser, "temperature": temperature, "observe": ("confidence", "entropy")}
    rows = UnmaskingVectorEnv(num_envs=num_envs, **settings)
    singles = [UnmaskingEnv(**settings) for _ in range(num_envs)]
    observation, infos = rows.reset(seed=11)
    seen = [env.reset(seed=11 + row) for row, env in enumerate(singles)]
    ends = Counter()
    for _ in range(20):
        for row, (single, info) in enumerate(seen):
            assert same({name: array[row] for name, array in observation.items()}, single, 3e-4)
            assert same({k: v for k, v in row_of(infos, row).items() if not k.startswith("final_")}, info, 3e-4)
        observation, rewards, terminated, _, infos = rows.step(threshold(observation))
        for row, env in enumerate(singles):
            single, reward, ended, _, info = env.step(threshold(seen[row][0]))
            assert (rewards[row], terminated[row]) == (reward, ended)
            if ended:
                ends[row] += 1
                assert same(infos["final_obs"][row], single) and same(row_of(infos["final_info"], row), info, 3e-4)
                assert not info["probability"].any() and not single["confidence"].any()
                single, info = env.reset()
            seen[row] = single, info
    assert len(ends) == num_envs and sum(ends.values()) >= 2 * num_envs


@pytest.mark.parametrize("form", ["TopK", "Threshold", "Position"])
def test_rows_of_a_form_equal_single_environments(form, denoiser):
    """Those of the embedded denoiser, whose confidences are not quite the same in a batch."""
    id, settings = f"MaskedDiffusion-Countdown-{form}-v0", {"num_envs": 4, "denoiser": denoiser, "temperature": 1.0}
    copies = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
    mine, theirs = gym.make_vec(id, **settings), gym.make_vec(id, **settings, **copies)
    assert same(mine.reset(seed=3)[0], theirs.reset(seed=3)[0])
    mine.action_space.seed(0)
    ends = 0
    for _ in range(12):
        actions = mine.action_space.sample()
        (seen, rewards, ended, _, infos), (*wanted, _, their_infos) = mine.step(actions), theirs.step(actions)
        assert all(same(one, other) for one, other in zip((seen, rewards, ended), wanted, strict=True))
        assert np.array_equal(infos["tokens"], their_infos["tokens"])
        ends += ended.sum()
    assert ends >= 3


# Gymnasium's semantics


def random_actions(form: str, rng: np.random.Generator) -> np.ndarray:
    """Of three rows of four positions, some of them empty sets or positions that are not eligible."""
    if form == "-Threshold":
        return rng.random((3, 1), dtype=np.float32)
    if form:
        return rng.integers(4, size=3)
    return rng.integers(2, size=(3, 4), dtype=np.int8) * rng.integers(2, size=(3, 1), dtype=np.int8)


@pytest.mark.parametrize("seed", [5, [8, 3, 5]], ids=["seed", "seeds"])
@pytest.mark.parametrize(
    "form, settings",
    [
        ("", {}),
        ("", {"max_steps": 2}),
        ("", {"empty_action": "noop", "max_steps": 3}),
        ("-TopK", {}),
        ("-Threshold", {"max_steps": 2}),
        ("-Position", {"empty_action": "noop", "max_steps": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_autoreset_is_that_of_gymnasium(form, mode, settings, seed, moody):
    id = f"MaskedDiffusion-Sudoku{form}-v0"
    settings = {"denoiser": moody, "temperature": 1.0, "observe": ("confidence", "token"), **settings}
    mine = gym.make_vec(id, task=ScriptedTask(), num_envs=3, autoreset_mode=mode, **settings)
    assert isinstance(mine, UnmaskingVectorEnv)
    single = functools.partial(gym.make, id, task=ScriptedTask(), disable_env_checker=True, **settings)
    theirs = SyncVectorEnv([single] * 3, autoreset_mode=AutoresetMode(mode))
    assert mine.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is AutoresetMode(mode)
    assert mine.autoreset_mode is theirs.autoreset_mode  # TorchRL looks here
    assert (mine.observation_space, mine.action_space) == (theirs.observation_space, theirs.action_space)
    rng = np.random.default_rng(0)
    pairs, ends, both = [(mine.reset(seed=seed), theirs.reset(seed=seed))], np.zeros(3, int), 0
    for _ in range(25):
        actions = random_actions(form, rng)
        pairs.append((mine.step(actions), theirs.step(actions)))
        ended = pairs[-1][0][2]
        ends += ended
        both += ended.any() and not ended.all()
        if mode == "Disabled" and ended.any():
            pairs.append(tuple(env.reset(options={"reset_mask": ended.copy()}) for env in (mine, theirs)))
    assert (ends >= 3).all() and both >= (1 if form == "-Position" else 3)
    for (*mine, infos), (*theirs, their_infos) in pairs:
        assert data_equivalence(tuple(mine), tuple(theirs), exact=True)
        assert infos.keys() == their_infos.keys()
        assert all((infos[key] == their_infos[key]).all() for key in infos if key.startswith("_"))
        assert all(same(row_of(infos, row), row_of(their_infos, row), 0) for row in range(3))


@pytest.mark.parametrize("mode", MODES)
def test_episode_statistics(mode, moody):
    env = UnmaskingVectorEnv(ScriptedTask(), 3, autoreset_mode=mode, denoiser=moody, temperature=1.0)
    env = RecordEpisodeStatistics(env)
    observation, _ = env.reset(seed=0)
    ends = 0
    for _ in range(20):
        observation, rewards, terminated, _, infos = env.step(threshold(observation, 0.4))
        if terminated.any():
            ended = infos["final_info"] if mode == "SameStep" else infos
            assert same(infos["episode"]["l"][terminated], ended["nfe"][terminated])
            assert same(infos["episode"]["r"][terminated], rewards[terminated])
            ends += terminated.sum()
            if mode == "Disabled":
                observation, _ = env.reset(options={"reset_mask": terminated.copy()})
    assert env.episode_count == ends >= 9 and len(set(env.length_queue)) > 1


@pytest.mark.parametrize("id", ["GSM8K", "Countdown", "Sudoku"])
def test_make_vec(id, denoiser):
    env = gym.make_vec(f"MaskedDiffusion-{id}-v0", num_envs=3, denoiser=denoiser, autoreset_mode="NextStep")
    assert isinstance(env, UnmaskingVectorEnv) and env.num_envs == 3
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observation, infos = env.reset(seed=0)
    assert observation in env.observation_space and len(set(infos["problem_id"])) == 3
    observation, rewards, terminated, truncated, _ = env.step(np.ones(env.action_space.shape, dtype=np.int8))
    assert observation in env.observation_space and terminated.all() and not truncated.any()
    assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float64, bool, bool)
    default = gym.make_vec(f"MaskedDiffusion-{id}-v0", num_envs=1, denoiser=denoiser)
    assert default.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert "autoreset_mode" not in UnmaskingVectorEnv.metadata


# Problems, seeds and partial resets


def test_a_problem_for_each_row(scripted, task):
    env = UnmaskingVectorEnv(task, 3, denoiser=scripted)
    assert env.reset(options={"problem": np.array([2, 0, 2])})[1]["problem_id"].tolist() == [
        "scripted/2",
        "scripted/0",
        "scripted/2",
    ]
    assert env.reset(options={"problem": 1})[1]["prompt"].tolist() == ["a a"] * 3
    drawn = {env.reset(seed=seed, options={"problem": [0, None, 1]})[1]["problem_id"][1] for seed in range(20)}
    assert len(drawn) == 3


def test_reset_mask_resets_its_rows_and_leaves_the_others_and_the_callers_options_alone(moody):
    env = UnmaskingVectorEnv(ScriptedTask(), 3, denoiser=moody, temperature=1.0, autoreset_mode="Disabled")
    env.reset(seed=0)
    before, *_, old = env.step(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]], dtype=np.int8))
    options = {"reset_mask": np.array([False, True, False]), "problem": np.array([0, 1, 2])}
    kept = copy.deepcopy(options)
    moody.calls.clear()
    after, infos = env.reset(seed=[1, 2, 3], options=options)
    assert data_equivalence(options, kept, exact=True) and moody.calls == [1]
    assert infos["_problem_id"].tolist() == [False, True, False] and infos["problem_id"][1] == "scripted/1"
    assert after["masked"].sum(axis=1).tolist() == [3, 4, 2] and after["progress"].ravel().tolist() == [0.25, 0, 0.25]
    assert all((after[name][[0, 2]] == before[name][[0, 2]]).all() for name in before)
    assert (infos["tokens"][[0, 2]] == old["tokens"][[0, 2]]).all()
    # only the row that was reset took its seed
    twin = UnmaskingEnv(ScriptedTask(), denoiser=moody, temperature=1.0)
    twin.reset(seed=2, options={"problem": 1})
    step = env.step(np.eye(4, dtype=np.int8)[[3, 3, 3]])
    assert same({name: array[1] for name, array in step[0].items()}, twin.step(np.eye(4, dtype=np.int8)[3])[0], 0)
    other = UnmaskingVectorEnv(ScriptedTask(), 3, denoiser=moody, temperature=1.0, autoreset_mode="Disabled")
    other.reset(seed=0)
    other.step(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]], dtype=np.int8))
    untouched = other.step(np.eye(4, dtype=np.int8)[[3, 3, 3]])
    assert all((step[4][key][[0, 2]] == untouched[4][key][[0, 2]]).all() for key in ("tokens", "probability"))


@pytest.mark.parametrize(
    "mask", [[True, False, True], np.zeros(3, dtype=bool), np.ones(2, dtype=bool), np.ones(3, dtype=np.int64)], ids=str
)
def test_bad_reset_mask(mask, scripted, task):
    env = UnmaskingVectorEnv(task, 3, denoiser=scripted)
    with pytest.raises(ValueError, match=r"options\['reset_mask'\].*bool array of shape \(3,\)"):
        env.reset(options={"reset_mask": mask})


def test_seeds_need_one_for_each_row(scripted, task):
    with pytest.raises(ValueError, match="seed: 2 values for num_envs=3"):
        UnmaskingVectorEnv(task, 3, denoiser=scripted).reset(seed=[1, 2])


# Forwards


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_one_forward_of_the_rows_that_run(mode, moody):
    env = UnmaskingVectorEnv(ScriptedTask(), 4, autoreset_mode=mode, denoiser=moody, max_steps=3)
    env.reset(seed=0)
    rng = np.random.default_rng(1)
    moody.calls.clear()
    wanted = []
    for _ in range(30):
        terminated = env.step(rng.integers(2, size=(4, 4)))[2]
        wanted.append(4 if mode == "SameStep" else int((~terminated).sum()))
        if mode == "Disabled" and terminated.all():
            env.reset()
            wanted.append(4)
    assert moody.calls == [rows for rows in wanted if rows]
    assert mode == "SameStep" or len(set(wanted)) > 2


@pytest.mark.parametrize("empty_action", ["best", "noop"])
def test_rows_that_wait_stay_as_they_are(empty_action, scripted, task):
    settings = {"max_steps": 2, "empty_action": empty_action, "denoiser": scripted, "render_mode": "ansi"}
    env = UnmaskingVectorEnv(task, 3, autoreset_mode="Disabled", **settings)
    env.reset(options={"problem": 0})
    first = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.int8)
    assert env.step(first)[2].tolist() == [True, False, False]
    env.reset(options={"reset_mask": np.array([False, False, True]), "problem": 1})
    before, rewards, terminated, _, infos = env.step(first[[0, 2, 1]])
    assert (rewards.tolist(), terminated.tolist()) == ([0, 0, 0], [True, True, False])
    assert infos["step_limit"][1] and infos["_step_limit"].tolist() == [False, True, False]
    assert infos["tokens"].tolist()[:2] == [[0, 1, 2, 3], [0, 1, MASK, MASK]]
    picture = env.render()[1]
    scripted.calls.clear()
    for actions in (np.ones((3, 4)), np.zeros((3, 4))):
        after, rewards, terminated, _, infos = env.step(actions)
        assert terminated.all() and rewards[:2].tolist() == [0, 0]
        assert all((after[name][:2] == before[name][:2]).all() for name in before)
        assert infos["tokens"].tolist()[:2] == [[0, 1, 2, 3], [0, 1, MASK, MASK]]
        assert not infos["unmasked"][:2].any() and "nfe" not in row_of(infos, 1)
    assert scripted.calls == [] and env.render()[1] == picture
    assert env.reset()[0]["masked"].all() and scripted.calls == [3]


def test_rows_that_wait_for_the_next_step_stay_as_they_are(scripted, task):
    env = UnmaskingVectorEnv(task, 2, autoreset_mode="NextStep", max_steps=1, denoiser=scripted)
    env.reset()
    env.step(np.eye(4, dtype=np.int8)[:2])
    observation, rewards, terminated, _, infos = env.step(np.ones((2, 4), dtype=np.int8))
    assert not terminated.any() and not rewards.any() and not infos["unmasked"].any()
    assert observation["masked"].all() and not observation["progress"].any() and infos["_problem_id"].all()


@pytest.mark.parametrize(("empty_action", "masked"), [("noop", [4, 4, 4]), ("best", [3, 2, 1])])
def test_the_step_limit_ends_with_score_0(empty_action, masked, scripted, task):
    settings = {"max_steps": 3, "empty_action": empty_action, "denoiser": scripted}
    env = UnmaskingVectorEnv(task, 2, autoreset_mode="Disabled", **settings)
    env.reset(options={"problem": 0})
    actions = np.array([[0, 0, 0, 0], [1, 0, 0, 0]])
    for step in range(3):
        observation, rewards, terminated, truncated, infos = env.step(actions)
        assert observation["masked"][0].sum() == masked[step] and observation["progress"][0] == (step + 1) / 4
        assert not rewards.any() and not truncated.any() and terminated.all() == terminated.any() == (step == 2)
    end = row_of(infos, 0)
    assert (end["step_limit"], end["score"], end["correct"], end["nfe"], end["completion"]) == (True, 0, False, 3, "")


def test_progress_stays_in_its_space_beyond_gen_length(scripted, task):
    env = UnmaskingVectorEnv(task, 1, max_steps=6, empty_action="noop", denoiser=scripted)
    env.reset()
    for _ in range(5):
        observation, _, terminated, *_ = env.step(np.zeros((1, 4)))
    assert observation in env.observation_space and observation["progress"] == 1 and not terminated
    _, rewards, terminated, _, infos = env.step(np.zeros((1, 4)))
    assert terminated and rewards == 0 and infos["final_info"]["nfe"] == 6


# Output


@pytest.mark.parametrize("mode", MODES)
def test_torch_output_equals_numpy_output(mode, moody):
    settings = {"denoiser": moody, "temperature": 1.0, "observe": ("confidence", "entropy", "token"), "max_steps": 3}
    numpy, tensors = (
        UnmaskingVectorEnv(ScriptedTask(), 3, autoreset_mode=mode, output=output, **settings)
        for output in ("numpy", "torch")
    )
    pairs = [(numpy.reset(seed=0), tensors.reset(seed=0))]
    rng = np.random.default_rng(0)
    for _ in range(10):
        actions = rng.integers(2, size=(3, 4))
        pairs.append((numpy.step(actions), tensors.step(torch.as_tensor(actions))))
    for (wanted, *rest, infos), (observation, *tensor_rest, tensor_infos) in pairs:
        assert all(isinstance(tensor, torch.Tensor) for tensor in (*observation.values(), *tensor_rest))
        assert all(str(wanted[name].dtype) == str(tensor.dtype)[6:] for name, tensor in observation.items())
        assert same({name: tensor.numpy() for name, tensor in observation.items()}, wanted, 0)
        assert same([tensor.tolist() for tensor in tensor_rest], [array.tolist() for array in rest])
        assert all(same(row_of(tensor_infos, row), row_of(infos, row), 0) for row in range(3))


@pytest.mark.parametrize("form", ["TopK", "Threshold", "Position"])
def test_torch_output_of_a_form_equals_numpy_output(form, moody):
    settings = {"task": ScriptedTask(), "denoiser": moody, "num_envs": 3, "max_steps": 2}
    numpy, tensors = (
        gym.make_vec(f"MaskedDiffusion-Sudoku-{form}-v0", output=output, **settings) for output in ("numpy", "torch")
    )
    rng = np.random.default_rng(0)
    pairs = [(numpy.reset(seed=0), tensors.reset(seed=0))]
    for _ in range(4):
        actions = random_actions(f"-{form}", rng)
        pairs.append((numpy.step(actions), tensors.step(torch.as_tensor(actions))))
    for (*wanted, infos), (*seen, their_infos) in pairs:
        assert all(isinstance(tensor, torch.Tensor) for tensor in seen) and seen[0].dtype == torch.float32
        assert all(same(tensor, array) for tensor, array in zip(seen, wanted, strict=True))
        assert all(same(row_of(their_infos, row), row_of(infos, row), 0) for row in range(3))


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize("mode", MODES)
def test_what_was_returned_never_changes(mode, output, moody):
    env = UnmaskingVectorEnv(ScriptedTask(), 3, autoreset_mode=mode, output=output, denoiser=moody, temperature=1.0)
    rng = np.random.default_rng(0)
    kept = [env.reset(seed=0)]
    bytes_then = [pickle.dumps(kept[0])]
    for _ in range(12):
        actions = rng.integers(2, size=(3, 4))
        given = actions.copy()
        kept.append(env.step(actions))
        bytes_then.append(pickle.dumps(kept[-1]))
        assert (actions == given).all()
        if mode == "Disabled" and (ended := np.asarray(kept[-1][2])).any():
            kept.append(env.reset(options={"reset_mask": ended.copy()}))
            bytes_then.append(pickle.dumps(kept[-1]))
    assert [pickle.dumps(returned) for returned in kept] == bytes_then


def scribble(returned) -> None:
    """Overwrite every array."""
    for value in returned.values() if isinstance(returned, dict) else returned:
        if isinstance(value, dict | tuple):
            scribble(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            value[...] = 1


@pytest.mark.parametrize("mode", MODES)
def test_what_was_returned_belongs_to_the_caller(mode, moody):
    settings = {"autoreset_mode": mode, "denoiser": moody, "temperature": 1.0, "max_steps": 3}
    env, spoiled = (UnmaskingVectorEnv(ScriptedTask(), 3, **settings) for _ in range(2))
    rng = np.random.default_rng(0)
    wanted, returned = env.reset(seed=0), spoiled.reset(seed=0)
    for _ in range(10):
        assert pickle.dumps(wanted) == pickle.dumps(returned)
        scribble(returned)
        actions = rng.integers(2, size=(3, 4))
        wanted, returned = env.step(actions), spoiled.step(actions)


# collect


PROBLEMS = [2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1]


def steps_of(rollout: Rollout, n: int):
    """Observation and picks of an episode's steps, in order."""
    own = (rollout.episode == n).nonzero()[:, 0]
    return rollout.observation[own], rollout.picks[own]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_collect_does_not_depend_on_the_number_of_rows(temperature, moody):
    policy, rollouts = make_policy("threshold", threshold=0.4), []
    for num_envs in (1, 3, 8, 20):
        env = UnmaskingVectorEnv(ScriptedTask(), num_envs, denoiser=moody, temperature=temperature)
        rollouts.append(collect(env, policy, PROBLEMS, seed=7))
    single = UnmaskingEnv(ScriptedTask(), denoiser=moody, temperature=temperature)
    for other in [*rollouts[1:], collect(single, policy, PROBLEMS, seed=7)]:
        assert [problem.id for problem in other.problems] == [f"scripted/{i}" for i in PROBLEMS]
        assert other.completions == rollouts[0].completions
        for name in ("tokens", "score", "correct", "nfe", "reward"):
            assert torch.equal(getattr(other, name), getattr(rollouts[0], name))
        for n in range(len(PROBLEMS)):
            (seen, picks), (wanted, wanted_picks) = steps_of(other, n), steps_of(rollouts[0], n)
            assert torch.equal(picks, wanted_picks)
            assert all(torch.equal(value, getattr(wanted, name)) for name, value in vars(seen).items())
    texts = {problem: set() for problem in PROBLEMS}
    for problem, text in zip(PROBLEMS, rollouts[0].completions, strict=True):
        texts[problem].add(text)
    assert (max(map(len, texts.values())) > 1) == (temperature > 0), "episodes of one problem draw for themselves"


def test_collect_on_the_embedded_denoiser_does_not_depend_on_the_number_of_rows(denoiser):
    policy, problems = make_policy("threshold", threshold=0.5), [*range(6), 0, 0]
    rollouts = [
        collect(UnmaskingVectorEnv("gsm8k", rows, denoiser=denoiser, temperature=0.8, split="test"), policy, problems)
        for rows in (1, 3, 8)
    ]
    for other in rollouts[1:]:
        assert torch.equal(other.tokens, rollouts[0].tokens) and torch.equal(other.nfe, rollouts[0].nfe)
        assert other.completions == rollouts[0].completions and torch.equal(other.reward, rollouts[0].reward)


def test_collect_packs_every_step_with_its_episode(moody):
    settings = {"temperature": 1.0, "alpha": 0.5, "stop_at_eos": False}
    env = UnmaskingVectorEnv(ScriptedTask(), 3, denoiser=moody, **settings)
    policy = make_policy("threshold", threshold=0.4)
    rollout = collect(env, policy, PROBLEMS)
    assert len(rollout) == len(PROBLEMS) and len(rollout.observation) == rollout.nfe.sum()
    assert torch.bincount(rollout.episode).tolist() == rollout.nfe.tolist() and len(set(rollout.nfe.tolist())) > 1
    assert not rollout.log_prob.any() and rollout.log_prob.shape == rollout.episode.shape
    assert torch.equal(rollout.picks.bool(), policy(rollout.observation))
    for n, problem in enumerate(rollout.problems):
        seen, picks = steps_of(rollout, n)
        assert seen.progress.tolist() == [step / 4 for step in range(len(picks))]
        tokens = torch.full((4,), MASK)
        for step, chosen in enumerate(picks):
            assert torch.equal(seen.masked[step], tokens == MASK)
            tokens = torch.where(chosen > 0, seen.token[step], tokens)
        assert torch.equal(tokens, rollout.tokens[n])
        verdict = env.episodes.task.verify(problem, rollout.completions[n])
        assert rollout.score[n] == verdict.score and rollout.correct[n] == verdict.correct
        assert rollout.reward[n] == pytest.approx(verdict.score * ((5 - len(picks)) / 4) ** 0.5)


class Acting:
    """Explores with nothing at first, then with everything; else it is left to right."""

    def choose(self, observation, explore=False):
        if not explore:
            return make_policy("left-to-right").choose(observation)
        picks = (observation.eligible & (observation.progress > 0)[:, None]).long()
        return picks, -observation.progress - 1


@pytest.mark.parametrize(("empty_action", "first"), [("noop", 4), ("best", 3)])
def test_collect_tells_the_sampler_whether_to_explore(empty_action, first, scripted, task):
    env = UnmaskingVectorEnv(task, 2, denoiser=scripted, empty_action=empty_action)
    rollout = collect(env, Acting(), [0, 1, 2])
    assert rollout.nfe.tolist() == [2, 2, 2]
    for n in range(3):
        seen, picks = steps_of(rollout, n)
        assert picks.sum(dim=1).tolist() == [0, first] and seen.masked.sum(dim=1).tolist() == [4, first]
    assert torch.equal(rollout.log_prob, -rollout.observation.progress - 1)
    assert collect(env, Acting(), [0, 1, 2], explore=False).nfe.tolist() == [4, 4, 4]


def test_collect_fills_its_rows_and_computes_no_others(moody):
    env = UnmaskingVectorEnv(ScriptedTask(), 4, denoiser=moody, max_steps=3)
    moody.calls.clear()
    rollout = collect(env, make_policy("left-to-right", k=2), PROBLEMS)
    assert moody.calls == [4, 4, 4, 4, 3, 3] and sum(moody.calls) == rollout.nfe.sum()
    ended = {one.number: one.end for one in play(env, make_policy("left-to-right", k=2), PROBLEMS)}
    assert sorted(ended) == list(range(11))
    assert [ended[n].info["completion"] for n in range(11)] == rollout.completions


def test_collect_cut_off_by_the_step_limit(scripted, task):
    env = UnmaskingVectorEnv(task, 3, denoiser=scripted, max_steps=2)
    rollout = collect(env, make_policy("left-to-right"), [0, 1, 0, 2])
    assert rollout.completions == [""] * 4 and not rollout.score.any() and not rollout.correct.any()
    assert rollout.tokens.tolist() == [[0, 1, MASK, MASK]] * 4 and rollout.nfe.tolist() == [2] * 4


def test_collect_depends_on_its_seed_and_on_nothing_before_it(moody):
    env = UnmaskingVectorEnv(ScriptedTask(), 3, denoiser=moody, temperature=1.0)
    policy = make_policy("threshold", threshold=0.4)
    first = collect(env, policy, PROBLEMS, seed=[3, 1]).tokens
    env.reset(seed=0)
    env.step(np.ones((3, 4)))
    assert torch.equal(first, collect(env, policy, PROBLEMS, seed=[3, 1]).tokens)
    assert not torch.equal(first, collect(env, policy, PROBLEMS, seed=[3, 2]).tokens)
    assert torch.equal(first[:5], collect(env, policy, PROBLEMS[:5], seed=[3, 1]).tokens)


def test_cat_moves_the_episodes_of_later_parts(moody):
    env = UnmaskingVectorEnv(ScriptedTask(), 3, denoiser=moody, temperature=1.0)
    policy = make_policy("threshold", threshold=0.4)
    parts = [collect(env, policy, problems, seed=n) for n, problems in enumerate(([0, 1], [2], PROBLEMS))]
    rollout = Rollout.cat(parts)
    assert [problem.id for problem in rollout.problems] == [f"scripted/{i}" for i in [0, 1, 2, *PROBLEMS]]
    assert torch.bincount(rollout.episode).tolist() == rollout.nfe.tolist()
    for offset, part in zip((0, 2, 3), parts, strict=True):
        assert rollout.completions[offset : offset + len(part)] == part.completions
        for n in range(len(part)):
            (seen, picks), (wanted, wanted_picks) = steps_of(rollout, offset + n), steps_of(part, n)
            assert torch.equal(seen.token, wanted.token) and torch.equal(picks, wanted_picks)
            assert torch.equal(rollout.tokens[offset + n], part.tokens[n])
