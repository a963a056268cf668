"""The benchmark of a denoiser's trainer, at sizes that measure nothing."""

from functools import partial

import pytest
import torch

from dllm_gym.agents.environment import EnvConfig
from dllm_gym.denoisers import base
from dllm_gym.eval.benchmarks import decoding as throughput
from dllm_gym.eval.benchmarks import trainer as trainer_throughput
from dllm_gym.eval.benchmarks.random_llama import ModelConfig, random_llama
from dllm_gym.eval.benchmarks.trainer import PHASES, peak_memory_alone, update_alone

TINY = ModelConfig(
    vocab_size=64, hidden_size=16, mlp_size=24, heads=2, prompt_length=3, gen_length=8, batch=4, microbatch=2
)
ENV = EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=4)


def test_every_line_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(trainer_throughput, "peak_memory_alone", trainer_throughput.peak_memory)
    flags = "--trainer espo --repeats 1 --threads 1 --env.id MaskedDiffusion-Countdown-v0 --env.num-envs 4"
    model = {"vocab-size": 64, "hidden-size": 16, "heads": 2, "prompt-length": 3, "gen-length": 8, "batch": 4}
    flags += "".join(f" --model.{name} {value}" for name, value in model.items())
    assert throughput.main(flags.split()) == 0
    shown = " ".join("".join(" " if c in "│┃" else c for c in capsys.readouterr().out).split())
    for line in (
        "completions a second",
        "peak memory",
        *(f"time in {phase}" for phase in PHASES),
        "x faster",
        "x less",
    ):
        assert line in shown
    assert "espo: an iteration" in shown and "V 64" in shown and "MaskedDiffusion-Countdown-v0" in shown


@pytest.mark.parametrize("name", ["spg", "gdsd-tlc"])
def test_the_plain_update_has_our_gradients(name, monkeypatch):
    monkeypatch.setattr(base, "CHUNK", 5 * TINY.vocab_size)  # the head runs over five positions at a time
    gradients = {}
    for plain in (False, True):
        contestant = update_alone(name, ENV, TINY, plain)
        learner, step = contestant.learner, contestant.learner._step

        def recorded(learner=learner, step=step, plain=plain):
            gradients[plain] = {key: master.grad.clone() for key, master in learner.weights.masters.items()}
            return step()

        learner._step = recorded
        assert contestant.run()["gradient_norm"] > 0
    for key, ours in gradients[False].items():
        assert (ours - gradients[True][key]).abs().max() <= 1e-5 * ours.abs().max(), key


def test_the_parts_of_an_iteration_add_up():
    contestant = trainer_throughput.on_llama("spg", ENV, TINY)
    score = contestant.learner.scorer.forward
    with trainer_throughput.timed(contestant.learner) as spent:
        start = trainer_throughput.now(torch.device("cpu"))
        contestant.run()
        total = trainer_throughput.now(torch.device("cpu")) - start
    assert set(spent) == set(PHASES[:-1]) and 0.5 * total < sum(spent.values()) <= total
    assert contestant.learner.scorer.forward == score and "_step" not in vars(contestant.learner)


def test_memory_in_a_process_of_its_own():
    model = ModelConfig(vocab_size=16384, hidden_size=16, layers=1, batch=4, prompt_length=4)
    logits = 2 * model.batch * model.gen_length * model.vocab_size * 4 / 1e9
    assert peak_memory_alone(partial(update_alone, "spg", ENV, model, plain=True), 1) > 2 * logits


def test_the_shape_of_llada():
    model = ModelConfig(size="llada-8b").resolved()
    denoiser = random_llama(model, torch.device("meta"))
    assert sum(p.numel() for p in denoiser.model.parameters()) == 8_015_581_184  # as published
    assert denoiser.model.dtype == torch.bfloat16 and model.lora_rank == 128
    assert not denoiser.model.config.is_causal


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--trainer ppo", "objective='ppo'"),
        ("--trainer spg --model.size 8b", "model.size='8b'"),
        ("--trainer spg --model.batch 0", "batch=0"),
        ("--trainer spg --model.dtype int8", "model.dtype='int8'"),
    ],
)
def test_mistakes(flags, message, capsys):
    assert throughput.main(flags.split()) == 2
    assert message in capsys.readouterr().err
