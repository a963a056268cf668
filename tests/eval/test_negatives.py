"""What updates with bad completions change: the measurement."""

import re

import pytest
import torch

from dllm_gym.agents.cli import flag, parse
from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.trainers.denoiser.trainer import load_trainable
from dllm_gym.eval.benchmarks.negatives import WAYS, NegativesConfig, calibration, figures, measure, sample

ENV = EnvConfig(id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=1.0, alpha=0.0, num_envs=16)


@pytest.fixture(scope="module")
def samples():
    config = NegativesConfig(env=ENV, problems=4, group=4, seeds=1)
    denoiser = load_trainable(ENV, "cpu")
    return denoiser, sample(config, denoiser, 1)


@pytest.mark.parametrize("way", ["mixture", "trajectory"])
def test_at_a_rate_of_zero_nothing_changes(way, samples):
    denoiser, (batch, unseen) = samples
    config = NegativesConfig(env=ENV, problems=4, group=4, updates=1, learning_rate=0.0)
    *changes, share, right = figures(config, way, 2, batch, unseen, 0)
    assert changes == pytest.approx([0.0] * 4, abs=1e-4)
    assert (share, right) == calibration(denoiser, unseen.steps, unseen.rollout.correct, config.threshold)


@pytest.mark.parametrize("way", ["left out", "trajectory, left out"])
def test_what_is_raised_goes_up(way, samples):
    _, (batch, unseen) = samples
    config = NegativesConfig(env=ENV, problems=4, group=4, updates=2, learning_rate=3e-5)
    good, bad, *_ = figures(config, way, 8, batch, unseen, 0)
    assert good > 0.05 > 0 > bad


def test_the_likelihood_is_that_of_the_draws(samples):
    """At the temperature of sampling: ``log p`` of the tokens that the rollout itself has put down, summed."""
    _, pair = samples
    for part in pair:
        seen, written = part.rollout.observation, part.steps.taken.written
        drawn = torch.where(written, seen.probability.log(), 0.0).sum(dim=1).double()
        wanted = torch.zeros(len(part.rollout), dtype=torch.float64).index_add(0, part.rollout.episode, drawn)
        torch.testing.assert_close(part.log_likelihood, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_a_training_that_could_run(way):
    algorithm, settings = WAYS[way]
    parse(algorithm, [part for item in settings.items() for part in flag(*item)]).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"ways": ("mixtures",)}, "ways=['mixtures']: must be of mixture"), ({"problems": 1, "group": 2}, "problems=1: ")],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(NegativesConfig(env=ENV, seeds=1, **settings))
