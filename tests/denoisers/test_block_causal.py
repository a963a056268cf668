"""SDAR and A2D from tiny checkpoints in their own naming, against their forward pass written out."""

import json
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from checkpoints import write_qwen
from errors import error_of
from reference import close, reference, some_tokens

from dllm_gym import decoding, load_denoiser

KINDS = ("sdar", "a2d-qwen3", "a2d-qwen2", "a2d-llama")
MASK = 259


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_qwen(root / kind, kind) for kind in KINDS}


def block_causal(length: int, size: int) -> torch.Tensor:
    block = torch.arange(length) // size
    return block[None, :] <= block[:, None]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_that_of_the_checkpoint(folders, kind, attention):
    tokens = some_tokens(30)
    denoiser = load_denoiser(folders[kind], attention=attention)
    visible = block_causal(30, 4) if kind == "sdar" else None
    assert close(denoiser.logits(tokens[None])[0], reference(folders[kind], tokens, visible))
    assert (denoiser.mask_token_id, denoiser.eos_token_ids) == (MASK, {256, 258})
    assert denoiser.block_size == (4 if kind == "sdar" else None)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_is_the_row_alone(folders, kind):
    denoiser = load_denoiser(folders[kind], block_size=3)
    tokens, padding = some_tokens(20), torch.full((20,), 7)
    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    logits = denoiser.logits(torch.where(mask, tokens, padding), mask)
    for row, start in enumerate((0, 6)):
        wanted = reference(folders[kind], tokens[start:], block_causal(20 - start, 3))
        assert close(logits[row, start:], wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_read_again(folders, kind, tmp_path):
    denoiser = load_denoiser(folders[kind])
    denoiser.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_denoiser(tmp_path / "saved")
    assert config["model_type"] == {"sdar": "qwen3"}.get(kind, kind[4:]) and not config["is_causal"]
    assert again.pattern == denoiser.pattern and again.caches == denoiser.caches
    assert torch.equal(again.logits(some_tokens(20)[None]), denoiser.logits(some_tokens(20)[None]))


def test_the_block_size_is_that_of_the_config_or_given(tmp_path, folders):
    assert load_denoiser(write_qwen(tmp_path / "eight", block_size=8)).block_size == 8
    assert load_denoiser(folders["a2d-qwen3"], block_size=32).pattern.name == "block-causal"
    assert "block_size=0: 'block-causal' needs" in error_of(ValueError, load_denoiser, folders["sdar"], block_size=0)


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"block_size": 0}, "block_size=0: 'block-causal' needs a number of positions, 1 or more"),
        ({"block_size": "4"}, "block_size='4'"),
        ({"attention_pattern": "causal"}, "attention_pattern='causal': must be one of bidirectional, prompt-causal"),
        ({"use_sliding_window": True}, r"use_sliding_window=True \(can be read: False\)"),
        ({"moe_layers": 3}, "fields that are not known, which could change what the model computes: moe_layers=3"),
        ({"rope_theta": None}, "config.json lacks rope_theta"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path, change, wanted):
    folder = write_qwen(tmp_path / "checkpoint", **change)
    with pytest.raises(ValueError, match=wanted):
        load_denoiser(folder)


def masked_canvas(lengths: list[int], gen_length: int, seed: int = 0):
    """Half-masked completions after prompts of these lengths, and their tokens."""
    canvas = decoding.blank([some_tokens(n, n) for n in lengths], gen_length, MASK)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, canvas.tokens.shape, generator=generator)
    canvas.masked = torch.rand(tokens.shape, generator=generator) < 0.5
    canvas.tokens = tokens.masked_fill(canvas.masked, MASK)
    return canvas, tokens


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 4, 8, 64])
def test_score_is_that_of_block_by_block_scoring(folders, size):
    """One forward pass for all blocks; alone, each block follows the clean ones before it, with nothing behind it."""
    denoiser = load_denoiser(folders["sdar"], block_size=size)
    canvas, tokens = masked_canvas([9, 4, 0], gen_length=8)
    score = denoiser.score(canvas, tokens, canvas.masked)
    for row, length in enumerate([9, 4, 0]):
        clean = torch.cat([some_tokens(length, length), tokens[row]])
        noisy = torch.cat([some_tokens(length, length), canvas.tokens[row]])
        for start in range(0, length + 8, size):
            one = torch.cat([clean[:start], noisy[start : start + size]])
            logits = denoiser.logits(one[None])[0]
            logits[:, MASK] = -torch.inf
            log_prob = logits.log_softmax(dim=-1)
            for i in range(max(start, length), len(one)):
                if canvas.masked[row, i - length]:
                    assert score.log_prob[row, i - length].item() == pytest.approx(
                        log_prob[i, clean[i]].item(), abs=1e-5
                    )


def test_score_does_not_see_what_it_scores(folders):
    denoiser = load_denoiser(folders["sdar"])
    canvas, tokens = masked_canvas([6], gen_length=8)
    last = canvas.masked & (torch.arange(8) >= 6)  # its block begins at position 12, of the prompt's six and six more
    changed = torch.where(last, (tokens + 1) % 256, tokens)
    logits = [denoiser.scoring_features(canvas, targets, canvas.masked) for targets in (tokens, changed)]
    assert last.any() and torch.equal(*logits)


def test_score_has_gradients(folders):
    denoiser = load_denoiser(folders["sdar"])
    denoiser.model.requires_grad_(True)
    canvas, tokens = masked_canvas([6, 3], gen_length=8)
    denoiser.score(canvas, tokens, canvas.masked).log_prob.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in denoiser.model.parameters())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"question": f"What is {n} + 2?", "answer": f"#### {n + 2}"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_an_environment_takes_the_denoisers_block(folders, data):
    env = gym.make("MaskedDiffusion-GSM8K-v0", denoiser=str(folders["sdar"]), dataset=data, gen_length=12)
    env.reset(seed=0)
    episodes = env.unwrapped.episodes
    shared = int(episodes.canvas.prompt_mask.sum()) % 4
    eligible = episodes.observation.eligible[0]
    assert eligible.tolist() == [i < 4 - shared for i in range(12)]
    assert not episodes.observation.confidence[0, 4 - shared :].any()


@pytest.mark.parametrize("block_length", [2, 6, 12])
def test_an_environment_refuses_other_blocks(folders, data, block_length):
    message = error_of(
        ValueError,
        gym.make,
        "MaskedDiffusion-GSM8K-v0",
        denoiser=str(folders["sdar"]),
        dataset=data,
        gen_length=12,
        block_length=block_length,
    )
    assert f"block_length={block_length}" in message and "block-causal and writes blocks of 4" in message
