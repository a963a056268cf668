"""GRPO, SPG and GDSD on tiny LLaDA and Dream checkpoints in the original naming, with data from a local file."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_dream, write_llada, write_qwen
from safetensors.torch import load_file

import dllm_gym
from dllm_gym.agents.cli import main
from dllm_gym.tasks.gsm8k import GSM8K
from dllm_gym.types import Verdict

ENV = "--env.id MaskedDiffusion-GSM8K-v0 --env.gen-length 16 --env.block-length 8 --env.num-envs 4 --threads 1".split()
LORA = "--lora.rank 2 --iterations 2 --problems 2 --group 2 --sampler confidence:k=4 --report.no-enabled".split()
POLICY = (
    "--iterations 2 --problems 2 --group 2 --experts 0.5 --policy.hidden-dim 16 --policy.mlp-dim 32 "
    "--report.no-enabled --checkpoint-every 1"
).split()


def write_a2d(folder: Path) -> Path:
    return write_qwen(folder, "a2d-qwen3")


@pytest.fixture(params=[write_llada, write_dream, write_qwen, write_a2d], ids=["llada", "dream", "sdar", "a2d"])
def checkpoint(request, tmp_path) -> list[str]:
    """Flags that name a checkpoint and a data file."""
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request.param(tmp_path / "checkpoint", **({"block_size": 8} if request.param is write_qwen else {}))
    return ["--env.denoiser", str(tmp_path / "checkpoint"), "--env.dataset", str(data)]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_sampler_is_trained(checkpoint, tmp_path):
    assert main(["grpo", *ENV, *checkpoint, *POLICY, "--run-dir", str(tmp_path / "run")]) == 0
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert 2 <= metrics(tmp_path / "run")[-1]["nfe"] <= 16  # two blocks


@pytest.mark.parametrize("objective", ["spg", "gdsd"])
def test_adapters_are_trained_and_load_on_their_base(checkpoint, objective, tmp_path, monkeypatch):
    # A random checkpoint solves nothing: a score that tells completions apart stands in for the verifier's.
    monkeypatch.setattr(GSM8K, "verify", lambda self, problem, text: Verdict(False, sum(map(ord, text)) % 7 / 7, None))
    assert main([objective, *ENV, *checkpoint, *LORA, "--run-dir", str(tmp_path / "run")]) == 0
    last = metrics(tmp_path / "run")[-1]
    assert last["equal_groups"] < 1 and last["gradient_norm"] > 0 and last["step_kl"] > 0
    adapter = load_file(tmp_path / "run/denoiser/adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and value.any() for name, value in adapter.items())
    trained = dllm_gym.load_denoiser(tmp_path / "run/denoiser", "cpu")
    tokens = torch.randint(5, 60, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trained.model.disable_adapter():
        base = trained.logits(tokens)
    assert (trained.logits(tokens) - base).abs().max() > 0


@pytest.mark.parametrize("checkpoint", [write_llada, write_dream], ids=["llada", "dream"], indirect=True)
@pytest.mark.parametrize("k, approximate", [(8, False), (2, True)])
def test_the_gap_that_a_cache_makes_is_logged(checkpoint, k, approximate, tmp_path):
    """With a whole block per step, every step enters its block and is forwarded whole."""
    flags = [*ENV, *checkpoint, *LORA, "--env.cache", "dual", "--sampler", f"confidence:k={k}"]
    assert main(["spg", *flags, "--run-dir", str(tmp_path / "run")]) == 0
    for row in metrics(tmp_path / "run"):
        assert row["cache_gap"] > 1e-3 if approximate else row["cache_gap"] < 1e-5
