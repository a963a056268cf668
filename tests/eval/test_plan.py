"""Calculated memory against what torch keeps."""

from dataclasses import replace

import pytest
import torch
from checkpoints import write_dream, write_llada, write_qwen

from dllm_gym import decoding, load_denoiser
from dllm_gym.agents.trainers.denoiser.learner import add_adapters
from dllm_gym.agents.trainers.denoiser.objective import LoRAConfig
from dllm_gym.denoisers.base import inputs_of
from dllm_gym.eval.gpu.plan import SHAPES, Setting, Shape, activations, advice, plan, shape_of

WRITERS = {
    "llada": write_llada,
    "llada, tied": lambda folder: write_llada(folder, weight_tying=True),
    "dream": write_dream,
    "sdar": write_qwen,
}
SETTING = Setting(rows=3, prompt_length=20, gen_length=12, microbatch=2, maskings=2)


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    return WRITERS[request.param](tmp_path / "checkpoint")


def close(calculated: float, counted: float) -> bool:
    return abs(calculated - counted) <= 0.1 * counted


def test_weights_and_adapters(folder):
    denoiser = load_denoiser(folder)
    shape = Shape.of(denoiser.causal_lm.config)
    assert shape == shape_of(str(folder))
    assert shape.weights == sum(p.numel() for p in denoiser.model.parameters())
    denoiser.model = add_adapters(denoiser.model, LoRAConfig(rank=3))
    adapters = sum(p.numel() for name, p in denoiser.model.named_parameters() if "lora_" in name)
    assert shape.adapter_weights(3) == adapters


def kept_for_backward(denoiser, setting: Setting) -> int:
    """Bytes of all storages that the forward pass keeps, weights left out."""
    rows = setting.microbatch * setting.maskings
    prompts = [torch.randint(5, 200, (setting.prompt_length - i,)) for i in range(rows)]
    canvas = decoding.blank(prompts, setting.gen_length, denoiser.mask_token_id)
    weights = {p.untyped_storage().data_ptr() for p in denoiser.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = denoiser.encode(*inputs_of(canvas))
    assert features.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_activations(kind, half, rank, tmp_path):
    sizes = {"d_model": 64, "mlp_hidden_size": 192, "n_layers": 6} if kind == "llada" else {"num_hidden_layers": 6}
    folder = WRITERS[kind](tmp_path / kind) if kind == "dream" else write_llada(tmp_path / kind, **sizes)
    if kind == "dream":
        folder = write_dream(tmp_path / "wide", **sizes, hidden_size=64, intermediate_size=192)
    denoiser = load_denoiser(folder, dtype="bfloat16" if half else "float32", attention="sdpa")
    if rank:
        denoiser.model = add_adapters(denoiser.model, LoRAConfig(rank=rank))
    else:
        denoiser.model.requires_grad_(True)
    setting = replace(SETTING, half=half, rank=rank)
    shape = Shape.of(denoiser.causal_lm.config)
    assert close(activations(shape, setting), kept_for_backward(denoiser, setting))


def test_checkpointing_keeps_the_inputs_of_layers(tmp_path):
    denoiser = load_denoiser(write_llada(tmp_path / "llada", n_layers=6, d_model=64), attention="sdpa")
    denoiser.model.requires_grad_(True)
    denoiser.model.gradient_checkpointing_enable()
    denoiser.model.enable_input_require_grads()
    denoiser.model.train()
    setting = replace(SETTING, half=False, checkpointing=True)
    shape = Shape.of(denoiser.causal_lm.config)
    without = replace(setting, checkpointing=False)
    one_layer = activations(replace(shape, layers=2), without) - activations(replace(shape, layers=1), without)
    assert close(activations(shape, setting) - one_layer, kept_for_backward(denoiser, setting))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("half", [False, True])
def test_what_a_learner_holds(half, rank, tmp_path):
    from dllm_gym.agents.environment import EnvConfig
    from dllm_gym.agents.trainers.denoiser.espo import ESPOConfig, espo_loss
    from dllm_gym.agents.trainers.denoiser.learner import Learner
    from dllm_gym.agents.trainers.denoiser.trainer import make_accelerator

    env = EnvConfig("MaskedDiffusion-Sudoku-v0", denoiser=str(write_llada(tmp_path / "llada")), temperature=1.0)
    config = ESPOConfig(env=env, lora=LoRAConfig(rank=rank))
    denoiser = load_denoiser(env.denoiser, dtype="bfloat16" if half else "float32")
    learner = Learner(denoiser, config, espo_loss, make_accelerator(config))
    for master in learner.weights.masters.values():
        master.grad = torch.zeros_like(master)
    for optimizer in learner.optimizers:
        optimizer.step()
    parts = plan(Shape.of(denoiser.causal_lm.config), replace(SETTING, half=half, rank=rank))
    size = sum(p.numel() * p.element_size() for n, p in denoiser.model.named_parameters() if "lora_" not in n)
    masters = sum(p.numel() * p.element_size() for p in learner.weights.masters.values())
    adam = [v for each in learner.optimizers for state in each.state.values() for v in state.values() if v.numel() > 1]
    assert parts["weights"] == size
    if rank:
        assert parts["adapters"] == masters
    else:
        assert parts.get("float32 weights", 0) == (masters if half else 0)
    assert parts["Adam"] == sum(v.numel() * v.element_size() for v in adam)


def test_the_cache_is_what_the_denoiser_says(folder):
    denoiser = load_denoiser(folder, dtype="float32")
    setting = replace(SETTING, half=False, cache="dual")
    parts = plan(Shape.of(denoiser.causal_lm.config), setting)
    assert parts["cache"] == denoiser.cache_bytes(3, 20 + 12 + 1)


def test_at_published_sizes():
    assert SHAPES["llada-8b"].weights == pytest.approx(8.016e9, rel=1e-3)
    assert SHAPES["dream-7b"].weights == pytest.approx(7.615e9, rel=2e-3)
    full = plan(SHAPES["llada-8b"], Setting())
    standing = sum(full[name] for name in ("weights", "float32 weights", "gradients", "Adam"))
    assert standing / 1e9 == pytest.approx(128, 0.01)
    eight = plan(SHAPES["llada-8b"], Setting(shard=True), 8)
    assert eight["Adam"] == full["Adam"] / 8 and eight["peak"] < full["peak"] / 2


def test_advice_is_what_fits():
    shape = SHAPES["llada-8b"]
    assert advice(shape, Setting(rank=128, checkpointing=True), 1, 80e9) == "fits"
    said = advice(shape, Setting(rank=128), 1, 40e9)
    assert said.startswith("fits with") and "--gradient-checkpointing" in said and "--lora.rank" not in said
    assert "--shard" in advice(shape, Setting(), 8, 80e9)
    assert "--lora.rank 128" in advice(shape, Setting(), 1, 80e9)
    assert advice(shape, Setting(), 1, 10e9).startswith("does not fit")


def test_a_model_that_is_nowhere():
    with pytest.raises(FileNotFoundError, match=r"plan='nothing': must be one of \['dream-7b', 'llada-8b'\]"):
        shape_of("nothing")
