"""Values that are no numbers never pass as results: whoever meets one says where it comes from."""

import math
import re

import gymnasium as gym
import pytest
import torch
from checkpoints import write_llada
from safetensors.torch import load_file, save_file
from scripted import ScriptedDenoiser, ScriptedTask

from dllm_gym import load_denoiser
from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.evaluation import evaluate
from dllm_gym.agents.samplers.heuristics import make_policy
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy, load_policy
from dllm_gym.agents.trainers.policy.grpo import GRPOConfig
from dllm_gym.agents.trainers.run import Run
from dllm_gym.decoding import blank
from dllm_gym.eval.cli import main as dllm_eval
from dllm_gym.types import Verdict

COUNTDOWN = "MaskedDiffusion-Countdown-v0"


@pytest.fixture
def broken(tmp_path):
    """A folder of the embedded denoiser with a weight that is no number."""
    denoiser = load_denoiser("embedded")
    with torch.no_grad():
        name, weight = list(denoiser.model.named_parameters())[-3]
        kept = weight.clone()
        weight[0] = math.nan
    denoiser.save(tmp_path / "broken")
    with torch.no_grad():
        weight.copy_(kept)
    return tmp_path / "broken", name


def test_a_denoiser_with_a_weight_that_is_no_number(broken, tmp_path, capsys):
    folder, name = broken
    said = f"denoiser '{folder}' in float32: the weight {name} is not finite; the checkpoint is broken."
    env = gym.make(COUNTDOWN, denoiser=str(folder))
    with pytest.raises(FloatingPointError, match=re.escape(said)):
        env.reset(seed=0)
    with pytest.raises(FloatingPointError, match=re.escape(said)):
        gym.make_vec(COUNTDOWN, num_envs=2, denoiser=str(folder)).reset(seed=0)
    episodes = make_env(EnvConfig(COUNTDOWN, denoiser=str(folder), num_envs=2, temperature=1.0)).unwrapped.episodes
    for likelihood in ("trajectory", "elbo"):
        with pytest.raises(FloatingPointError, match=re.escape(said)):
            Metropolis(steps=1, likelihood=likelihood).run(episodes, [0])
    output = tmp_path / "results.jsonl"
    for sampler in ("threshold", "metropolis:steps=1"):
        flags = f"--sampler {sampler} --env.id {COUNTDOWN} --env.denoiser {folder} --env.temperature 1 --problems 2"
        assert dllm_eval([*flags.split(), "--output", str(output)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert '"problem"' not in output.read_text()


def test_scores_are_no_numbers_either(broken):
    denoiser = load_denoiser(str(broken[0]))
    canvas = blank([torch.tensor([5, 6])], 4, denoiser.mask_token_id)
    with pytest.raises(FloatingPointError, match="the weight"):
        denoiser.score(canvas, torch.full((1, 4), 5), canvas.masked)


def test_a_range_that_is_too_small(tmp_path):
    """What float32 computes and float16 cannot hold, in the layer where it happens."""
    folder = write_llada(tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    name = "model.transformer.blocks.1.ff_out.weight"
    weights[name] = weights[name] / weights[name].abs().max() * 6e4
    save_file(weights, folder / "model.safetensors")
    canvas = blank([torch.arange(5, 25), torch.arange(5, 9)], 4, 259)
    assert load_denoiser(str(folder), dtype="float32").predict(canvas).entropy.isfinite().all()
    half = load_denoiser(str(folder), dtype="float16")
    with pytest.raises(FloatingPointError) as error:
        half.predict(canvas)
    assert str(error.value) == (
        f"denoiser '{folder.resolve()}' in float16: the output of model.layers.1.mlp.down_proj is not finite; "
        f"give dtype='bfloat16' or 'float32', whose range is wider."
    )
    assert not any(module._forward_hooks for module in half.model.modules())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_of_a_denoiser_of_ones_own(value):
    denoiser = ScriptedDenoiser([[0.5, 0.5, 0.0, 0.0, 0.0]] * 4)
    logits = denoiser.logits
    canvas = blank([torch.zeros(1, dtype=torch.int64)], 4, denoiser.mask_token_id)
    assert denoiser.predict(canvas).entropy.isfinite().all()  # tokens that cannot be: minus infinity is a logit

    def spoilt(*arguments, **options):
        found = logits(*arguments, **options).clone()
        found[0, -1, 0] = value
        return found

    denoiser.logits = spoilt
    with pytest.raises(FloatingPointError, match="denoiser: its logits are not finite"):
        denoiser.predict(canvas)


def test_a_policy_with_a_weight_that_is_no_number(embedded, tmp_path):
    policy = UnmaskingPolicy(PolicyConfig(hidden_dim=8, mlp_dim=8)).seeded(0)
    with torch.no_grad():
        policy.trunk.out.weight[0, 0] = math.nan
    env = make_env(EnvConfig(COUNTDOWN, num_envs=2), denoiser=embedded)
    for act in (policy, policy.act):
        with pytest.raises(
            FloatingPointError, match=r"the policy's logits are not finite: its weights trunk\.out\.weight"
        ):
            act(env.unwrapped.episodes.observation)
    with pytest.raises(ValueError, match=r"policy='.*weights trunk.out.weight are not finite"):
        load_policy(policy.save(tmp_path / "policy"))


@pytest.mark.parametrize(
    ("reward", "score"), [(lambda *_: math.nan, 1.0), (lambda *_: None, 1.0), ("multiplicative", math.inf)]
)
def test_rewards_and_scores_that_are_no_numbers(reward, score, scripted, tmp_path):
    task = ScriptedTask()
    task.verify = lambda problem, completion: Verdict(True, score, completion)
    settings = {"denoiser": scripted, "task": task, "reward": reward}
    with pytest.raises(FloatingPointError, match=r"problem 'scripted/0': reward (nan|inf) for score"):
        env = gym.make(COUNTDOWN, **settings)
        env.reset(options={"problem": 0})
        env.step(env.action_space.high if hasattr(env.action_space, "high") else [1] * 4)
    rows = gym.make_vec(COUNTDOWN, num_envs=2, **settings)
    with pytest.raises(FloatingPointError, match="verifiers and rewards must give finite numbers"):
        rows.reset(options={"problem": 0})
        rows.step([[1] * 4] * 2)
    with pytest.raises(FloatingPointError, match="verifiers and rewards must give finite numbers"):
        evaluate(rows, make_policy("threshold"), [0, 1])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda v: gym.make(COUNTDOWN, temperature=v), "temperature"),
        (lambda v: gym.make(COUNTDOWN, alpha=v), "alpha"),
        (lambda v: make_policy("factor", factor=v), "factor"),
        (lambda v: make_policy("tempered-confidence", temperature=v), "temperature"),
        (lambda v: Metropolis(alpha=v), "alpha"),
        (lambda v: UnmaskingPolicy(PolicyConfig(temperature=v)), "temperature"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_arguments_that_are_no_numbers(make, named, value):
    with pytest.raises(ValueError, match=f"{named}={value}"):
        make(value)


@pytest.mark.parametrize(
    "make", [lambda v: make_policy("threshold", threshold=v), lambda v: make_policy("entropy-bounded", gamma=v)]
)
def test_thresholds_may_be_out_of_reach_but_are_numbers(make):
    make(math.inf)
    with pytest.raises(ValueError, match="=nan"):
        make(math.nan)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"learning_rate": math.nan}, "learning_rate=nan"), ({"experts": (0.5, math.nan)}, "experts=")],
)
def test_settings_of_a_run_that_are_no_numbers(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        Run("grpo", GRPOConfig(**changes, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
