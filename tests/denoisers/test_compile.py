"""Compiled layers say what the layers say. The backends here do all but generate code, which takes a compiler."""

import pytest
import torch
from checkpoints import write_dream, write_llada, write_qwen
from errors import error_of
from reference import some_tokens

from dllm_gym import load_denoiser
from dllm_gym.agents import decode
from dllm_gym.agents.cli import main
from dllm_gym.decoding import blank

WRITERS = {"llada": write_llada, "dream": write_dream, "sdar": write_qwen}
CACHES = [("dream", "none"), ("llada", "dual"), ("sdar", "prefix")]


@pytest.mark.parametrize(("kind", "cache"), CACHES)
def test_the_same_completions(kind, cache, tmp_path):
    folder = WRITERS[kind](tmp_path / kind)
    prompts = [some_tokens(n, n) for n in (3, 9, 6)]
    options = {"gen_length": 8, "block_length": 4, "cache": cache, "temperature": 1.0, "num_rows": 2}
    plain, compiled = (
        decode(load_denoiser(folder, compile=backend), prompts, **options) for backend in (None, "eager")
    )
    assert torch.equal(plain.tokens, compiled.tokens) and torch.equal(plain.positions, compiled.positions)


def test_layers_share_one_compiled_code(tmp_path):
    """More layers are no more work: none of them is compiled for itself, with a cache or without."""
    denoiser = load_denoiser(write_llada(tmp_path / "llada", n_layers=6), compile="eager")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for cache in ("none", "dual"):
        decode(denoiser, [some_tokens(5)], gen_length=8, block_length=4, cache=cache)
    assert 0 < counters["stats"]["unique_graphs"] < 12


def test_gradients_are_the_same(tmp_path):
    folder = write_llada(tmp_path / "llada")
    gradients = []
    for backend in (None, "aot_eager"):
        denoiser = load_denoiser(folder, compile=backend)
        denoiser.model.requires_grad_(True)
        canvas = blank([some_tokens(4), some_tokens(7)], 6, denoiser.mask_token_id)
        targets = torch.stack([some_tokens(6, 1), some_tokens(6, 2)])
        denoiser.score(canvas, targets, canvas.masked).log_prob.sum().backward()
        gradients.append({name: p.grad for name, p in denoiser.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_compiled_denoiser_trains_saves_and_loads(tmp_path):
    flags = "--problems 2 --group 2 --iterations 1 --report.no-enabled --env.num-envs 4 --env.compile eager"
    assert main(["spg", *flags.split(), "--run-dir", str(tmp_path / "run")]) == 0
    tokens, lengths = some_tokens(9)[None] % 100, torch.tensor([3])
    load_denoiser(tmp_path / "run" / "denoiser").logits(tokens, prompt_length=lengths)


def test_mistakes(tmp_path):
    assert "compile='indutcor': must be None, or one of" in error_of(
        ValueError, lambda: load_denoiser("embedded", compile="indutcor")
    )
    assert "the oracle is a table" in error_of(ValueError, lambda: load_denoiser("oracle", compile="inductor"))
