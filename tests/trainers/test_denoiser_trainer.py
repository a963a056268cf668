"""Trainers of the denoiser: the loop, the learner, resuming, mistakes."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from accelerate.utils import DistributedType
from interrupted import interrupted
from learners import SUDOKU, TIMING, changeable, completions_of, early, joint_config, make_learner, metrics_of
from policies import tiny_policy
from scripted import ScriptedTask
from torch import Tensor

import dllm_gym
from dllm_gym import make_task
from dllm_gym.agents import make_policy
from dllm_gym.agents.cli import main, parse
from dllm_gym.agents.environment import make_env
from dllm_gym.agents.trainers import joint
from dllm_gym.agents.trainers.denoiser import OBJECTIVES, load_objective, trainer
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig
from dllm_gym.agents.trainers.denoiser.espo import ESPOConfig, espo_loss
from dllm_gym.agents.trainers.denoiser.gdsd import GDSDConfig, gdsd_loss
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.denoiser.objective import LoRAConfig
from dllm_gym.agents.trainers.denoiser.spg import SPGConfig, spg_loss
from dllm_gym.denoisers.oracle import TabularDenoiser
from dllm_gym.envs.vector import UnmaskingVectorEnv

SMALL = {"problems": 2, "group": 3, "inner_iterations": 2, "warmup": 1, "threads": 1, "sampler": "confidence:k=4"}
QUIET = SMALL | {"env": SUDOKU, "report": DenoiserReportConfig(enabled=False), "iterations": 4, "checkpoint_every": 2}
FLAGS = (
    "--env.id MaskedDiffusion-Sudoku-v0 --env.num-envs 8 --problems 2 --group 3 --iterations 2 --inner-iterations 2 "
    "--warmup 1 --threads 1 --sampler confidence:k=4 --report.no-enabled"
).split()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# From the command line


@pytest.mark.parametrize("algorithm", OBJECTIVES)
def test_every_objective_trains_from_the_command_line(algorithm, tmp_path):
    """Finite metrics, and a denoiser that has changed and that everything takes."""
    folder = tmp_path / "run"
    state = torch.get_rng_state()
    assert main([algorithm, *FLAGS, "--run-dir", str(folder)]) == 0
    assert torch.equal(state, torch.get_rng_state())
    one, two = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert all(math.isfinite(value) for value in (one | two).values())
    shared = {"reward", "accuracy", "nfe", "entropy", "equal_groups", "excluded", "step_kl", "loss", "gradient_norm"}
    assert set(one) == set(two) > shared | set(TIMING)
    assert (one["nfe"], one["completion_length"]) == (4, 16)
    config = parse(algorithm, FLAGS)
    maskings = config.trace.steps if config.uses_trajectory else config.corruption.maskings
    passes = maskings * (2 * 3 + config.uses_old + 2 * config.uses_reference)  # two updates; a backward pass is two
    learned = [max(1, round(6 * row["learned_from"])) for row in (one, two)]
    assert [one["forwards"], two["forwards"]] == [24 + passes * learned[0], 48 + passes * sum(learned)]
    assert two["seconds"] > one["seconds"] and one["gradient_norm"] > 0 and one["step_kl"] > 0
    trained, before = dllm_gym.load_denoiser(folder / "denoiser"), early()
    assert all(not torch.equal(p, before_p) for p, before_p in zip(*map(changeable, (trained, before)), strict=True))
    env = gym.make("MaskedDiffusion-Sudoku-v0", denoiser=str(folder))
    mine, saved = (changeable(denoiser)[0] for denoiser in (env.unwrapped.episodes.denoiser, trained))
    assert torch.equal(mine, saved), "a run's folder stands for the denoiser in it"
    observation, _ = env.reset(seed=0)
    assert env.step(observation["eligible"])[2]
    assert (folder / "summary.json").exists() and (folder / "curve.png").exists()


def test_the_report_compares_before_and_after(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*FLAGS, "--report.enabled", "--report.problems", "3", "--report.samplers", "confidence:k=8"]
    flags.remove("--report.no-enabled")
    assert main(["spg", *flags, "--learning-rate", "0", "--run-dir", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["problems"] == 3 and set(summary["rows"]["confidence:k=8"]) == {"before", "spg"}
    rows = summary["rows"]["confidence:k=8"]
    assert rows["before"] == rows["spg"] and summary["gains"]["confidence:k=8"]["gain"] == 0, "nothing was learned"
    assert "held-out" in capsys.readouterr().out


def test_a_trained_policy_can_decode_and_report(tmp_path):
    policy = str(tmp_path / "policy")
    tiny_policy(confidence_k=3).save(policy, trained_in={})
    flags = [*FLAGS, "--sampler", policy, "--env.block-length", "4", "--corruption.kind", "block"]
    flags += ["--report.enabled", "--report.problems", "2", "--report.samplers", policy]
    assert main(["spg", *flags, "--run-dir", str(tmp_path / "run")]) == 0
    assert metrics_of(tmp_path / "run")[0]["nfe"] != 4


def test_a_sampler_gets_the_confidences_it_reads(tmp_path):
    assert main(["spg", *FLAGS, "--sampler", "margin:k=8", "--run-dir", str(tmp_path / "run")]) == 0


def test_the_seed_decides_everything(tmp_path):
    """Adapters included, whose initialisation knows no generator but the global one."""
    runs = {}
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        torch.manual_seed(len(name))
        flags = [*FLAGS, "--seed", seed, "--lora.rank", "2", "--lora.dropout", "0.2"]
        assert main(["espo", *flags, "--run-dir", str(tmp_path / name)]) == 0
        file = tmp_path / name / "denoiser" / "adapter_model.safetensors"
        runs[name] = metrics_of(tmp_path / name), file.read_bytes()
    assert runs["one"] == runs["same"] and runs["one"][0] != runs["other"][0] and runs["one"][1] != runs["other"][1]


# Adapters


def test_adapters_alone_change_and_are_saved_alone(tmp_path):
    folder = tmp_path / "run"
    flags = [*FLAGS, "--lora.rank", "4", "--learning-rate", "0.01", "--kl-weight", "0.1"]
    assert main(["espo", *flags, "--run-dir", str(folder)]) == 0
    assert not (folder / "denoiser" / "model.safetensors").exists()
    trained, before = dllm_gym.load_denoiser(folder / "denoiser"), early()
    tokens = completions_of(before)[0]
    nothing = torch.zeros(len(tokens), dtype=torch.int64)  # no prompts
    with torch.no_grad():
        wanted = before.logits(tokens, prompt_length=nothing)
        assert (trained.logits(tokens, prompt_length=nothing) - wanted).abs().max() > 1e-2
        with trained.model.disable_adapter():
            torch.testing.assert_close(trained.logits(tokens, prompt_length=nothing), wanted)
    assert metrics_of(folder)[1]["kl"] > 0
    env = gym.make("MaskedDiffusion-Sudoku-v0", denoiser=str(folder / "denoiser"))
    env.reset(seed=0)


def test_an_adapter_is_merged_before_it_is_trained_further(tmp_path, capsys):
    """Else the weights below it would be trained and not be saved."""
    assert main(["espo", *FLAGS, "--lora.rank", "2", "--run-dir", str(tmp_path / "run")]) == 0
    adapter = str(tmp_path / "run" / "denoiser")
    assert main(["espo", *FLAGS, "--env.denoiser", adapter, "--run-dir", str(tmp_path / "more")]) == 2
    assert "merge()" in capsys.readouterr().err and not (tmp_path / "more").exists()
    dllm_gym.load_denoiser(adapter).merge().save(tmp_path / "merged")
    assert main(["espo", *FLAGS, "--env.denoiser", str(tmp_path / "merged"), "--run-dir", str(tmp_path / "more")]) == 0


# Rewards that are no numbers


def vector_env(reward, **settings) -> UnmaskingVectorEnv:
    task = make_task("sudoku")
    return UnmaskingVectorEnv(task, 8, denoiser=early(), temperature=1.0, alpha=0.0, reward=reward, **settings)


def improve_with(reward, monkeypatch, algorithm: str = "spg") -> tuple[dict, dict]:
    """Metrics of one iteration and what the learner was given; all rewards are looked up in the order of ending."""
    config_type, loss = load_objective(algorithm)
    given = {}
    plain = Learner.update

    def spy(learner, tokens, prompts, advantage, weight, generator, rate, steps):
        given.update(tokens=tokens, prompts=prompts, advantage=advantage.view(2, 3), weight=weight.view(2, 3))
        return plain(learner, tokens, prompts, advantage, weight, generator, rate, steps)

    monkeypatch.setattr(Learner, "update", spy)
    env = vector_env(reward)
    learner = make_learner(config_type(**QUIET), loss, env.episodes.denoiser)
    metrics, problems = trainer.improve(learner, [env], make_policy("confidence", k=4), 0)
    assert len(problems) == 2
    return metrics, given


def in_turn(rewards: list):
    """A reward function that gives one after the other."""
    rewards = iter(rewards)
    return lambda score, nfe, gen_length, alpha: next(rewards)


@pytest.mark.parametrize("broken", [None, math.nan, math.inf])
def test_a_reward_that_is_no_number_is_excluded_with_a_warning(broken, monkeypatch, capsys):
    plain = [0.1, 0.5, 0.9, 0.3, 0.2, 0.7]  # decoded side by side, episodes end in their order
    broken_at = [0.1, broken, 0.9, 0.3, 0.2, 0.7]
    _, expected = improve_with(in_turn(plain), monkeypatch)
    assert "excluded" not in capsys.readouterr().err
    metrics, given = improve_with(in_turn(broken_at), monkeypatch)
    warning = capsys.readouterr().err
    assert warning.count("excluded") == 1 and "sudoku" in warning
    assert torch.equal(given["tokens"], expected["tokens"])
    assert torch.equal(given["advantage"][1], expected["advantage"][1])
    torch.testing.assert_close(given["advantage"][0], torch.tensor([-0.4, 0.0, 0.4]))
    torch.testing.assert_close(given["weight"], torch.tensor([[0.2, 0.0, 0.2], [0.2, 0.2, 0.2]]))
    assert metrics["excluded"] == 1 and metrics["reward"] == pytest.approx(2.2 / 5)
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_completions_of_a_problem_lie_side_by_side(monkeypatch):
    """As advantages take them; and what one group says about its own reward does not reach the other."""
    _, given = improve_with(in_turn([1.0, 0.0, 0.5, 0.2, 0.2, 0.2]), monkeypatch)
    prompts = [prompt.tolist() for prompt in given["prompts"]]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3] and prompts[3] == prompts[4] == prompts[5]
    torch.testing.assert_close(given["advantage"], torch.tensor([[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]]))
    assert not torch.equal(given["tokens"][0], given["tokens"][1])


def test_every_iteration_has_problems_and_completions_of_its_own():
    env = vector_env("multiplicative")
    sampler = make_policy("confidence", k=4)
    learner = make_learner(SPGConfig(**QUIET | {"problems": 4}), spg_loss, env.episodes.denoiser)
    learner.update = lambda tokens, *_: seen.append(tokens) or {"forwards": 0.0}
    seen: list[Tensor] = []
    first, second, again = (trainer.improve(learner, [env], sampler, i)[1].tolist() for i in (0, 1, 0))
    assert first == again and set(first).isdisjoint(second)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("algorithm", ["spg", "wd1", "gdsd"])
def test_without_any_reward_nothing_is_learned(algorithm, monkeypatch, capsys):
    metrics, given = improve_with(lambda *_: None, monkeypatch, algorithm)
    assert metrics["excluded"] == 6 and metrics["gradient_norm"] == 0 and not given["weight"].any()
    assert all(math.isfinite(value) for value in metrics.values())
    assert capsys.readouterr().err.count("excluded") == 6


def test_a_loss_that_is_not_finite_stops_with_step_and_problems(tmp_path):
    def broken(batch, config):
        loss, metrics = spg_loss(batch, config)
        return loss * math.nan, metrics

    folder = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=r"step 1: .*loss, .*gradient_norm.* problems \[\d+, \d+\]"):
        trainer.train("spg", SPGConfig(**QUIET, run_dir=str(folder)), broken)
    assert not list(folder.glob("checkpoint*")) and not (folder / "denoiser").exists()


# Resuming


RUNS = {
    "gdsd": lambda **changes: trainer.train(
        "gdsd", GDSDConfig(**QUIET, reference_share=0.3, kl_weight=0.1, **changes), gdsd_loss
    ),
    "lora": lambda **changes: trainer.train(
        "espo", ESPOConfig(**QUIET, lora=LoRAConfig(rank=2, dropout=0.3), **changes), espo_loss
    ),
    "half": lambda **changes: trainer.train(  # bfloat16 is slow where hardware does not have it
        "spg", SPGConfig(**QUIET | {"env": replace(SUDOKU, dtype="bfloat16"), "problems": 1}, **changes), spg_loss
    ),
    "joint": lambda **changes: joint.train(joint_config(**changes)),
}


@pytest.fixture
def play(tmp_path):
    """Train into ``tmp_path / name``; after line ``kill_at`` of the log it dies, after ``signal_at`` comes Ctrl-C."""

    def play(kind: str, name: str, *, kill_at: int = 0, signal_at: int = 0, resume: bool = False) -> Path:
        folder = tmp_path / name
        with interrupted(kill_at, signal_at):
            assert RUNS[kind](**{"resume" if resume else "run_dir": str(folder)}) == folder
        return folder

    return play


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one(kind, play):
    """Killed after the third iteration, and stopped with Ctrl-C after the first."""
    whole = play(kind, "whole")
    assert len(metrics_of(whole)) == 4
    for name, how, checkpoint in (("killed", {"kill_at": 3}, 2), ("stopped", {"signal_at": 1}, 1)):
        folder = play(kind, name, **how)
        assert [path.name for path in folder.glob("checkpoint*")] == [f"checkpoint-{checkpoint:06d}"]
        assert not (folder / "denoiser").exists() and not (folder / "summary.json").exists()
        play(kind, name, resume=True)
        assert metrics_of(folder) == metrics_of(whole)
        weights = [path.relative_to(whole) for path in whole.glob("*/*.safetensors")]
        assert len(weights) == (4 if kind == "joint" else 3)
        for path in weights:
            assert (folder / path).read_bytes() == (whole / path).read_bytes(), path
        assert (folder / "summary.json").exists()


def test_the_command_line_resumes_a_run_and_refuses_another_objective(play, capsys):
    folder = play("gdsd", "run", kill_at=3)
    before = contents(folder)
    for algorithm in ("spg", "gdsd-tlc", "joint"):
        assert main([algorithm, "--resume", str(folder)]) == 2
        assert "a run of 'gdsd'" in capsys.readouterr().err and contents(folder) == before
    config = GDSDConfig(**QUIET, reference_share=0.3, kl_weight=0.1, resume=str(folder))
    with pytest.raises(ValueError, match=r"algorithm: 'gdsd' -> 'gdsd-tlc'"):
        trainer.train("gdsd-tlc", config, gdsd_loss)
    assert contents(folder) == before
    assert main(["gdsd", "--resume", str(folder)]) == 0
    assert [row["step"] for row in metrics_of(folder)] == [1, 2, 3, 4]


# Mistakes: one line, and no folder


JOINT_FLAGS = "--env.id MaskedDiffusion-Sudoku-v0 --threads 1".split()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("spg --group 1", "group=1"),
        ("spg --env.temperature 0", "env.temperature=0"),
        ("spg --iterations 0", "iterations=0"),
        ("spg --microbatch 0", "microbatch=0"),
        ("spg --baseline mean", "baseline='mean'"),
        ("spg --corruption.kind mask", "corruption='mask'"),
        ("spg --corruption.kind coupled --corruption.maskings 3", "maskings=3"),
        ("spg --corruption.kind block --corruption.block-length 5", "block_length=5"),
        ("spg --corruption.p-mask-prompt 1", "p_mask_prompt=1"),
        ("spg --env.block-length 5", "block_length=5"),
        ("spg --env.id MaskedDiffusion-Chess-v0", "MaskedDiffusion-Chess-v0"),
        ("spg --env.denoiser nowhere/to-be-found", "nowhere/to-be-found"),
        ("spg --env.denoiser oracle", "env.denoiser='oracle': has no weights"),
        ("spg --env.id MaskedDiffusion-Oracle-v0", "its denoiser must be the oracle"),
        ("spg --env.device cuda:1", "env.device='cuda:1'"),
        ("spg --env.dtype float16", "train in bfloat16"),
        ("spg --optimizer sgd", "optimizer='sgd'"),
        ("spg --sampler greedy", "sampler='greedy'"),
        ("spg --sampler metropolis:alpha=2", "sampler='metropolis:alpha=2': proposes whole completions"),
        ("spg --report.samplers confidance", "sampler='confidance'"),
        ("spg --report.samplers", "report.samplers is empty"),
        ("grpo --report.thresholds", "report.thresholds is empty"),
        ("spg --sampler confidence:k", "'k' is not of the form"),
        ("spg --lora.rank -1", "lora.rank=-1"),
        ("spg --lora.rank 2 --lora.targets q_proj query", "lora.targets=('q_proj', 'query'): ['query']"),
        ("spg --lora.rank 2 --lora.targets", "lora.targets=(): nothing"),
        ("spg --beta 0.5", "beta=0.5"),
        ("gdsd --reference-share 2", "reference_share=2"),
        ("joint --objective grpo", "objective='grpo'"),
        ("joint --rounds 0", "rounds=0"),
        ("joint --report.problems 0", "problems=0"),
        ("joint --report.samplers metropolis", "metropolis"),
        ("joint --denoiser.sampler random", "denoiser.sampler='random'"),
        ("joint --denoiser.forwards 9000", "denoiser.forwards: is set by the joint training; give --forwards"),
        ("joint --forwards 200", "forwards=200: the first step of 256 completions needs more"),
        ("grpo --forwards 100", "forwards=100: the first step of 176 completions needs more"),
        ("joint --denoiser.env.temperature 0.5", "--env"),
        ("joint --grpo.seed 3", "--seed"),
        ("joint --temperature 0", "error: temperature=0"),
        ("joint --objective spg --denoiser.lora.rank 2 --denoiser.lora.targets x", "lora.targets"),
        ("joint --denoiser.corruption.maskings 3", "maskings=3"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(flags, part, tmp_path, capsys):
    name, *given = flags.split()
    folder = tmp_path / "run"
    settings = {"joint": JOINT_FLAGS, "grpo": []}.get(name, FLAGS)
    assert main([name, *settings, "--run-dir", str(folder), *given]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert part in line
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"num_processes": 3}, "problems=2: must be a multiple of the 3 processes"),
        ({"distributed_type": DistributedType.FSDP}, "FSDP"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "DDP"),
        ({"mixed_precision": "fp16"}, "train in bfloat16"),
        ({"gradient_accumulation_steps": 4}, "--microbatch"),
    ],
)
def test_ways_of_launching_that_do_not_work(given, part, tmp_path, monkeypatch):
    works = {"num_processes": 2, "distributed_type": DistributedType.MULTI_CPU}
    works |= {"mixed_precision": "no", "gradient_accumulation_steps": 1}
    fake = SimpleNamespace(**works | given)
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: fake)
    with pytest.raises(ValueError, match=part):
        trainer.train("spg", SPGConfig(**QUIET, run_dir=str(tmp_path / "run")), spg_loss)
    assert not (tmp_path / "run").exists()


# Learning


@pytest.mark.parametrize("algorithm", OBJECTIVES)
def test_learns_a_sentence(algorithm):
    """On a table that begins almost even, word by word in random order; the score is the share of right words."""
    config_type, loss = load_objective(algorithm)
    config = config_type(problems=1, group=64, iterations=25, inner_iterations=3, learning_rate=0.2, warmup=1)
    if algorithm.startswith("gdsd"):
        config = replace(config, psi=4.0, reference_share=0.0)  # else it stops, rightly, near where it began
    denoiser = TabularDenoiser.random(4, 4, seed=0, scale=0.1)
    env = UnmaskingVectorEnv(ScriptedTask(["b d a c"]), 64, denoiser=denoiser, temperature=1.0, alpha=0.0)
    learner = make_learner(config, loss, denoiser)
    # A table knows nothing of canvases that were never scored, and full masking scores one canvas only.
    sampler = make_policy("random", k=4 if config.corruption.kind == "full" else 1)
    rewards = [trainer.improve(learner, [env], sampler, iteration)[0]["reward"] for iteration in range(25)]
    assert rewards[0] < 0.3 and sum(rewards[-5:]) / 5 > 0.75, rewards


def test_make_env_is_given_the_denoiser_in_training():
    """Else decoding would go on with the weights that training began with."""
    denoiser = early()
    env = make_env(replace(SUDOKU, denoiser=denoiser))
    assert env.episodes.denoiser is denoiser


def test_a_budget_of_forward_passes_ends_training(tmp_path):
    """After the iteration that spends it; the learning rate follows it, and a stopped run spends the rest."""
    flags = "--problems 2 --group 3 --inner-iterations 1 --warmup 1 --forwards 150 --checkpoint-every 1".split()
    flags = [*FLAGS[:4], *flags, "--threads", "1", "--sampler", "confidence:k=4", "--report.no-enabled"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main(["spg", *flags, "--run-dir", str(whole)]) == 0
    rows = metrics_of(whole)
    assert rows[-1]["forwards"] >= 150 > rows[-2]["forwards"]
    for row, before in itertools.pairwise(rows[::-1]):
        progress = before["forwards"] / 150
        assert row["learning_rate"] == pytest.approx(1e-4 * 0.5 * (1 + math.cos(math.pi * progress)))
    shutil.copytree(whole, half)
    for path in (half / "denoiser", *sorted(half.glob("checkpoint-*"))[1:]):
        shutil.rmtree(path)
    (half / "summary.json").unlink()
    assert main(["spg", "--resume", str(half)]) == 0
    assert metrics_of(half) == rows
