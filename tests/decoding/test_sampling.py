"""Drawing tokens: temperature, top-p, top-k, end tokens, and the confidence that is shown."""

import math

import pytest
import torch
from scripted import EOS, MASK, ScriptedDenoiser, ScriptedTask

from dllm_gym import decoding, load_denoiser
from dllm_gym.agents import decode
from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.decoding.sampling import draw, drawing_logits
from dllm_gym.envs.episodes import Episodes
from dllm_gym.envs.settings import EnvSettings
from dllm_gym.types import TokenSampling

PROBABILITIES = [0.1, 0.4, 0.2, 0.3]


def left(**settings) -> list[float]:
    """What the probabilities above become."""
    return drawing_logits(torch.tensor([PROBABILITIES]).log(), TokenSampling(**settings)).softmax(dim=-1)[0].tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, PROBABILITIES),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.75, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.3, "top_k": 3}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0.5, "top_p": 0.75}, [0, 16 / 25, 0, 9 / 25]),  # 0.9 of the untempered would be left
        ({"temperature": 2.0, "top_p": 0.75, "top_k": 3}, [0, *(math.sqrt(p) / 1.62739 for p in (0.4, 0.2, 0.3))]),
    ],
)
def test_what_tokens_are_drawn_from(settings, expected):
    assert left(**settings) == pytest.approx(expected, abs=1e-4)


def test_equal_tokens_do_not_all_pass():
    logits = torch.zeros(1, 5)
    assert drawing_logits(logits, TokenSampling(top_k=2)).isfinite().sum() == 2
    assert drawing_logits(logits, TokenSampling(top_p=0.5)).isfinite().sum() == 3


def test_draws_follow_the_filtered_distribution():
    n = 3001
    logits = torch.tensor([PROBABILITIES]).log().expand(n, -1)
    tokens = draw(drawing_logits(logits, TokenSampling(1.0, top_p=0.75)), (torch.arange(n) + 0.5) / n)
    counts = torch.bincount(tokens, minlength=4) / n
    assert counts.tolist() == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=1e-3)


@pytest.mark.parametrize("total", [0.5000001, 0.75, 0.9999999])
def test_rounding_draws_no_token_that_is_left_out(total):
    """The largest uniform number times the total may round up to the total, behind which only zeros stand."""
    logits = torch.tensor([[total, 1 - total, 0, 0]]).log().repeat(2, 1)
    assert (draw(logits, torch.tensor([1 - 2**-24, 0.0])) < 2).all()


def predict(row: list[float], **settings):
    canvas = decoding.blank([torch.zeros(0, dtype=torch.int64)], 1, MASK)
    uniforms = torch.tensor([[0.5]]) if settings.get("temperature") else None
    return ScriptedDenoiser([row]).predict(canvas, 2, TokenSampling(**settings), uniforms)


def test_tempered_confidence_is_that_of_the_draw_and_probability_is_not():
    row = [0.0, 0.6, 0.3, 0.1]
    shown = predict(row, temperature=0.5, top_p=0.9, confidence="tempered")
    assert shown.confidence.flatten().tolist() == pytest.approx([0.8, 0.2])
    assert float(shown.entropy) == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2), abs=1e-6)
    assert float(shown.probability) == pytest.approx(0.6)
    assert float(shown.draw_log_prob) == pytest.approx(math.log(0.8))
    filtered = predict(row, top_p=0.7, confidence="tempered")  # at temperature 0, Dream's filter still counts
    assert filtered.confidence.flatten().tolist() == pytest.approx([2 / 3, 1 / 3])
    assert float(filtered.probability) == pytest.approx(0.6) and float(filtered.draw_log_prob) == 0
    plain = predict(row, temperature=0.5, top_p=0.9)
    assert plain.confidence.flatten().tolist() == pytest.approx([0.6, 0.3])


def test_the_penalty_comes_before_everything():
    row = [0.2 if i == 1 else 0.8 if i == EOS else 0.0 for i in range(6)]
    assert predict(row).token.item() == EOS
    halved = predict(row, end_token_penalty=math.log(8))
    assert halved.token.item() == 1
    assert halved.confidence.flatten().tolist() == pytest.approx([2 / 3, 1 / 3])
    assert float(halved.probability) == pytest.approx(2 / 3)
    never = predict(row, end_token_penalty=1e9)
    assert never.confidence.flatten().tolist() == pytest.approx([1, 0])


def test_end_tokens_last():
    row = [0.2 if i == 1 else 0.8 if i == EOS else 0.0 for i in range(6)]
    shown = predict(row, end_tokens_last=True)
    assert shown.token.item() == EOS and shown.confidence.flatten().tolist() == [0, 0]
    assert float(shown.probability) == pytest.approx(0.8)
    other = predict(row, end_tokens_last=True, end_token_penalty=math.log(8))
    assert other.confidence.flatten().tolist() == pytest.approx([2 / 3, 1 / 3])


def test_no_end_token_is_written_under_a_large_penalty():
    denoiser = load_denoiser("embedded")
    prompts = [make_env(EnvConfig(num_envs=1)).unwrapped.episodes.task[i].prompt for i in range(4)]
    free = decode(denoiser, prompts, gen_length=24)
    forced = decode(denoiser, prompts, gen_length=24, end_token_penalty=1e9)
    ends = torch.tensor(sorted(denoiser.eos_token_ids))
    assert torch.isin(free.tokens, ends).any() and not torch.isin(forced.tokens, ends).any()
    assert (forced.nfe == 24).all()
    last = decode(denoiser, prompts, gen_length=24, end_tokens_last=True)
    assert not torch.equal(last.nfe, free.nfe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 0.0}, r"top_p=0.0: must be above 0, and at most 1"),
        ({"top_p": 1.5}, r"top_p=1.5"),
        ({"top_p": math.nan}, r"top_p=nan"),
        ({"top_k": 0}, r"top_k=0: must be 1 or more"),
        ({"confidence": "sharp"}, r"confidence='sharp': must be 'untempered' or 'tempered'"),
        ({"end_token_penalty": -1.0}, r"end_token_penalty=-1.0: must be 0 or more"),
        ({"end_token_penalty": math.inf}, r"end_token_penalty=inf.*1e9 never writes it"),
        ({"temperature": -1.0}, r"temperature=-1.0"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EnvSettings(**settings).check()


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.9}, {"top_k": 3}, {"end_token_penalty": 1.0}, {"end_tokens_last": True}]
)
def test_metropolis_hastings_refuses_what_changes_its_proposals(settings, scripted):
    episodes = Episodes(ScriptedTask(), 2, EnvSettings(denoiser=scripted, temperature=1.0, **settings))
    with pytest.raises(ValueError, match="needs proposals from the denoiser's own distribution"):
        Metropolis().check(episodes)
