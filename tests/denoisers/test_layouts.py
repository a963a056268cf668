"""Denoisers and adapters in the layout in which their authors publish them."""

import json

import pytest
import torch
from checkpoints import write_dream, write_llada, write_qwen
from peft import LoraConfig, get_peft_model
from reference import close, reference, some_tokens
from safetensors.torch import load_file, save_file

from dllm_gym import load_denoiser
from dllm_gym.denoisers.pretrained import PretrainedDenoiser

WRITERS = {
    "llada": write_llada,
    "llada, tied": lambda folder: write_llada(folder, weight_tying=True),
    "dream": write_dream,
    "sdar": write_qwen,
    "a2d": lambda folder: write_qwen(folder, "a2d-qwen3"),
}


@pytest.fixture(params=WRITERS)
def published(request, tmp_path):
    """A published checkpoint with a file of code, which must never be run."""
    folder = WRITERS[request.param](tmp_path / "published")
    (folder / "modeling_of_theirs.py").write_text("raise SystemExit('this must not be run')\n")
    return folder


def weights_of(folder) -> dict[str, torch.Tensor]:
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}


def small_files(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".txt", ".py")}


def assert_same_checkpoint(one, other) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    files = [{n: t for n, t in small_files(f).items() if n != "config.json"} for f in (one, other)]
    assert files[0] == files[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    for config in configs:
        config.pop("torch_dtype", None)
    assert configs[0] == configs[1]


def test_original_to_ours_and_back_is_equal_bit_for_bit(published, tmp_path):
    denoiser = load_denoiser(published, dtype="float32")
    denoiser.save(tmp_path / "straight", layout="original")
    assert_same_checkpoint(published, tmp_path / "straight")

    denoiser.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] in ("llama", "qwen2", "qwen3")
    load_denoiser(tmp_path / "ours", dtype="float32").save(tmp_path / "back", layout="original")
    assert_same_checkpoint(published, tmp_path / "back")
    tokens = some_tokens(9)[None]
    assert torch.equal(load_denoiser(tmp_path / "back").logits(tokens), denoiser.logits(tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_config_names_the_dtype_of_the_weights(dtype, tmp_path):
    load_denoiser(write_dream(tmp_path / "dream"), dtype=dtype).save(tmp_path / "again", layout="original")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == dtype
    assert {str(weight.dtype) for weight in weights_of(tmp_path / "again").values()} == {f"torch.{dtype}"}


def test_a_block_size_that_was_given_is_kept(tmp_path):
    denoiser = load_denoiser(write_qwen(tmp_path / "a2d", "a2d-qwen3"), block_size=8)
    denoiser.save(tmp_path / "ours")
    load_denoiser(tmp_path / "ours").save(tmp_path / "again", layout="original")
    assert load_denoiser(tmp_path / "again").block_size == 8


def with_adapter(denoiser: PretrainedDenoiser) -> PretrainedDenoiser:
    """An adapter that changes the logits."""
    torch.manual_seed(0)
    denoiser.model = get_peft_model(denoiser.model, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
    for name, parameter in denoiser.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    denoiser.model.eval()
    return denoiser


def test_an_adapter_in_the_original_layout(published, tmp_path):
    trained = with_adapter(load_denoiser(published))
    tokens = some_tokens(12)[None]
    trained.save(tmp_path / "adapter", layout="original")
    again = load_denoiser(tmp_path / "adapter")
    assert close(again.logits(tokens), trained.logits(tokens))
    names = weights_of(tmp_path / "adapter")
    theirs = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}
    assert {f"{name}.weight" for name in theirs} < weights_of(published).keys()
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert set(targets) == theirs

    merged = again.merge()
    merged.save(tmp_path / "merged", layout="original")
    assert weights_of(tmp_path / "merged").keys() == weights_of(published).keys()
    assert close(load_denoiser(tmp_path / "merged").logits(tokens), trained.logits(tokens))
    expected = reference(tmp_path / "merged", tokens[0])
    if "sdar" not in str(json.loads((published / "config.json").read_text())["model_type"]):
        assert close(trained.logits(tokens)[0], expected, 1e-4)


def test_an_adapter_that_others_trained_on_lladas_names(tmp_path):
    """With peft's short target names, as everybody writes them: "ff_out" is also what LLaDA calls its head."""
    folder = write_llada(tmp_path / "llada")
    generator = torch.Generator().manual_seed(1)
    weights, merged = {}, load_file(folder / "model.safetensors")
    for layer in range(2):
        for name, (rows, columns) in {"q_proj": (32, 32), "attn_out": (32, 32), "ff_out": (32, 48)}.items():
            module = f"model.transformer.blocks.{layer}.{name}"
            down = torch.randn(4, columns, generator=generator) * 0.2
            up = torch.randn(rows, 4, generator=generator) * 0.2
            adapted = f"base_model.model.{module}"
            weights |= {f"{adapted}.lora_A.weight": down, f"{adapted}.lora_B.weight": up}
            merged[f"{module}.weight"] = merged[f"{module}.weight"] + 2 * up @ down
    (tmp_path / "adapter").mkdir()
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": None, "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(folder)}
    config["target_modules"] = ["q_proj", "attn_out", "ff_out"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    adapted = load_denoiser(tmp_path / "adapter")
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = some_tokens(10)
    assert close(adapted.logits(tokens[None])[0], reference(folder, tokens), 1e-4)


def test_large_checkpoints_are_written_in_shards(tmp_path, monkeypatch):
    import huggingface_hub

    write = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", lambda *a: write(*a, max_shard_size="20KB"))
    folder = write_llada(tmp_path / "llada")
    load_denoiser(folder).save(tmp_path / "again", layout="original")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    tokens = some_tokens(9)[None]
    assert torch.equal(load_denoiser(tmp_path / "again").logits(tokens), load_denoiser(folder).logits(tokens))


def test_what_was_never_published_has_no_original_layout(tmp_path):
    with pytest.raises(ValueError, match="was not read from a published checkpoint; leave the layout out"):
        load_denoiser("embedded").save(tmp_path / "x", layout="original")
    with pytest.raises(ValueError, match="layout='hf': must be 'transformers' or 'original'"):
        load_denoiser("embedded").save(tmp_path / "x", layout="hf")
    assert not (tmp_path / "x").exists()
