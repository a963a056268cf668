"""Published settings by name."""

import pytest

from dllm_gym.agents.environment import EnvConfig, env_spec
from dllm_gym.agents.samplers.spec import make_sampler
from dllm_gym.eval.cli import main
from dllm_gym.eval.presets import load_preset, presets

SMALL = "--env.denoiser embedded --env.dataset embedded --env.gen-length 24 --env.block-length 24 --problems 4"


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_setting(name):
    preset = presets()[name]
    env = EnvConfig(**preset.env)
    env.check()
    env_spec(env.id)
    make_sampler(preset.sampler)
    assert env.gen_length % (env.block_length or env.gen_length) == 0
    assert preset.published and all(0 < score < 100 for score in preset.published.values())


def test_a_preset_runs_and_the_published_score_stands_below(capsys):
    assert main(["--preset", "Dream-Instruct-GSM8K", *SMALL.split()]) == 0
    shown = capsys.readouterr().out
    assert "published: 81.0 (Dream), 82.0 (dLLM)" in shown and "source: arXiv 2508.15487" in shown
    assert "temperature 0.1" in shown and "top_p 0.9" in shown and "confidence tempered" in shown


def test_a_flag_changes_a_preset_and_another_sampler_stands_beside_it(capsys):
    flags = [
        "--preset",
        "d1-llada-instruct-gsm8k-256",
        *SMALL.split(),
        "--sampler",
        "random",
        "--env.temperature",
        "0.5",
    ]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "confidence:k=2" in shown and "random" in shown and "temperature 0.5" in shown


def test_an_unknown_preset_names_the_nearest(capsys):
    assert main(["--preset", "llada-instruct-gsm8"]) == 2
    assert "Did you mean 'llada-instruct-gsm8k'?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="preset='other'"):
        load_preset("other")
