"""A denoiser in 4 bits, and adapters on it."""

import sys

import pytest
import torch
from checkpoints import write_dream, write_llada
from reference import some_tokens

from dllm_gym import load_denoiser
from dllm_gym.agents.cli import main
from dllm_gym.agents.trainers.denoiser.learner import add_adapters
from dllm_gym.agents.trainers.denoiser.objective import LoRAConfig

SPG = "--problems 2 --group 2 --iterations 1 --inner-iterations 1 --report.no-enabled --env.num-envs 4"


@pytest.fixture
def folder(tmp_path):
    """Wide enough for blocks of 64 weights to matter."""
    return write_llada(tmp_path / "llada", d_model=64, mlp_hidden_size=128)


def test_layers_are_in_four_bits_and_nearly_what_they_were(folder):
    whole, quantized = load_denoiser(folder), load_denoiser(folder, quantization="nf4")
    layer, other = (d.model.model.layers[0].mlp.down_proj.weight for d in (whole, quantized))
    assert other.dtype == torch.uint8 and other.nbytes * 8 == layer.nbytes
    assert quantized.model.lm_head.weight.dtype == torch.float32  # embedding and head stay
    tokens = some_tokens(20)[None]
    expected, found = (denoiser.logits(tokens).flatten() for denoiser in (whole, quantized))
    assert 0.9 < torch.nn.functional.cosine_similarity(expected, found, dim=0) < 0.9999


def test_adapters_train_on_it_and_load_on_the_whole_one(tmp_path, folder):
    denoiser = add_adapters_to(load_denoiser(folder, quantization="nf4"))
    tokens = some_tokens(12)[None]
    denoiser.logits(tokens).log_softmax(dim=-1)[..., 7].sum().backward()
    trained = {name: p for name, p in denoiser.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.02)
    denoiser.save(tmp_path / "adapter")
    again = load_denoiser(tmp_path / "adapter", quantization="nf4")
    with torch.no_grad():  # with a gradient, bitsandbytes takes another kernel
        assert torch.allclose(again.logits(tokens), denoiser.logits(tokens), atol=1e-5)
    load_denoiser(tmp_path / "adapter").merge().save(tmp_path / "merged")
    with pytest.raises(ValueError, match="weights are in nf4; load the adapter without quantization, and merge"):
        again.merge()


def add_adapters_to(denoiser):
    denoiser.model = add_adapters(denoiser.model, LoRAConfig(rank=4))
    return denoiser


def test_the_trainer_with_a_quantized_base(tmp_path, capsys):
    flags = [*SPG.split(), "--env.quantization", "nf4", "--run-dir", str(tmp_path / "run")]
    assert main(["spg", *flags]) == 2
    assert "env.quantization: weights in 4 bits are not trained; give --lora.rank" in capsys.readouterr().err
    assert main(["spg", *flags, "--lora.rank", "2"]) == 0
    assert load_denoiser(tmp_path / "run", quantization="nf4").quantization == "nf4"


def test_what_cannot_be(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match="quantization='int3': must be None or 'nf4'"):
        load_denoiser(folder, quantization="int3")
    with pytest.raises(ValueError, match="nf4' with float16"):
        load_denoiser(folder, dtype="float16", quantization="nf4")
    with pytest.raises(ValueError, match="weights in nf4 are not saved; adapters on them are"):
        load_denoiser(write_dream(tmp_path / "dream"), quantization="nf4").save(tmp_path / "x")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"bitsandbytes is not installed: pip install 'dllm-gym\[quantization\]'"):
        load_denoiser(folder, quantization="nf4")
