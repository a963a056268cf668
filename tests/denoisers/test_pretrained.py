"""LLaDA and Dream from tiny checkpoints in their own naming, against their forward pass written out here."""

import json
import re
import shutil

import gymnasium as gym
import huggingface_hub
import pytest
import torch
from checkpoints import DREAM_SPECIAL, LLADA_SPECIAL, write_dream, write_llada
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reference import close, reference, some_tokens
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import dllm_gym
from dllm_gym import decoding, load_denoiser
from dllm_gym.denoisers.pretrained import PretrainedDenoiser

WRITERS = {"llada": write_llada, "dream": write_dream}
PROBLEMS = [("What is 2 + 2?", "It is 4.\n#### 4"), ("A longer one: what is twice 21?", "#### 42")]
LLADA_ENDS, DREAM_ENDS = {257, 260}, {256, 258}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder a kind. Tests that change a folder take `copy`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write(root / kind) for kind, write in WRITERS.items()}


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, folders):
    return folders[kind]


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in PROBLEMS))
    return str(path)


def error_of(expected: type[Exception], *arguments, **options) -> str:
    with pytest.raises(expected) as caught:
        load_denoiser(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The forward pass


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_the_original_code(attention, folder):
    denoiser = load_denoiser(folder, attention=attention)
    assert denoiser.model.config._attn_implementation == attention
    tokens = torch.stack([some_tokens(40, seed) for seed in (0, 1)])
    tokens[:, 20:35] = denoiser.mask_token_id
    logits = denoiser.logits(tokens)
    assert logits.dtype == torch.float32 and logits.std() > 0.5
    assert all(close(logits[row], reference(folder, tokens[row])) for row in range(2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (write_llada, {"weight_tying": True, "n_kv_heads": 2}),
        (write_llada, {"rope_theta": 10000.0, "rms_norm_eps": 0.1, "n_heads": 2, "n_kv_heads": 1}),
        (write_dream, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        (write_dream, {"rope_theta": 10000.0, "rms_norm_eps": 0.1, "num_attention_heads": 8}),
    ],
)
def test_other_shapes(write, changes, tmp_path):
    folder = write(tmp_path / "other", **changes)
    assert close(load_denoiser(folder).logits(some_tokens(30)[None])[0], reference(folder, some_tokens(30)))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_row_equals_the_row_alone(attention, folder):
    denoiser = load_denoiser(folder, attention=attention)
    rows = [some_tokens(length, length) for length in (30, 23, 1)]
    tokens, mask = decoding.pad_left(rows)
    for padding in (0, 77):
        logits = denoiser.logits(torch.where(mask, tokens, padding), mask)
        for row, alone in enumerate(rows):
            assert close(logits[row, mask[row]], reference(folder, alone))


@torch.no_grad()
def test_logits_at_positions(folder):
    denoiser = load_denoiser(folder)
    tokens, positions = some_tokens(20)[None], torch.tensor([[19, 0, 1, 7]])
    assert close(denoiser.logits(tokens, positions=positions), denoiser.logits(tokens)[:, positions[0]])


def test_dream_predicts_a_token_from_the_column_before_and_the_first_from_its_own(folders):
    denoiser = load_denoiser(folders["dream"])
    tokens, mask = decoding.pad_left([some_tokens(9), some_tokens(5)])
    features = denoiser.encode(tokens, mask)
    denoiser.shifted = False
    own = denoiser.encode(tokens, mask)
    assert torch.equal(features[:, 5:], own[:, 4:-1]) and torch.equal(features[0, 1:], own[0, :-1])
    assert torch.equal(features[0, 0], own[0, 0]) and torch.equal(features[1, 4], own[1, 4])


# Loading


@torch.no_grad()
def test_shards_are_one_checkpoint(kind, folder, tmp_path):
    sharded = WRITERS[kind](tmp_path / "sharded", shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    tokens = some_tokens(20)[None]
    assert torch.equal(load_denoiser(sharded).logits(tokens), load_denoiser(folder).logits(tokens))


@torch.no_grad()
@pytest.mark.parametrize(("name", "dtype", "tolerance"), [("bf16", torch.bfloat16, 0.2), ("fp16", torch.float16, 0.05)])
def test_half_precision(name, dtype, tolerance, folder):
    denoiser = load_denoiser(folder, dtype=name)
    assert {parameter.dtype for parameter in denoiser.model.parameters()} == {dtype}
    logits = denoiser.logits(some_tokens(30)[None])
    assert logits.dtype == dtype and close(logits[0], reference(folder, some_tokens(30)), tolerance)


def test_facts_that_decoding_relies_on(kind, folder):
    denoiser = load_denoiser(str(folder))
    facts = (denoiser.mask_token_id, denoiser.eos_token_id, set(denoiser.eos_token_ids))
    assert facts == {"llada": (261, 257, LLADA_ENDS), "dream": (260, 256, DREAM_ENDS)}[kind]
    assert (denoiser.vocab_size, denoiser.context_length, denoiser.default_dataset) == (272, 512, "hub")
    assert denoiser.device == torch.device("cpu") and not any(p.requires_grad for p in denoiser.model.parameters())
    tokenizer = denoiser.tokenizer
    text = "<|endoftext|>What is 2 + 2?\n~ü"
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == denoiser.eos_token_id and max(tokens[1:]) < 256 and tokenizer.decode(tokens) == text


@pytest.mark.parametrize("changes", [{"pad_token_id": None}, {"eos_token_id": [257, 65]}])
def test_end_tokens_come_from_the_config_and_the_tokenizer(changes, tmp_path):
    denoiser = load_denoiser(write_llada(tmp_path / "other", **changes))
    assert denoiser.eos_token_ids == LLADA_ENDS | ({65} if "eos_token_id" in changes else set())


def test_the_embedded_denoiser_is_as_it_was(embedded):
    facts = (embedded.mask_token_id, embedded.eos_token_id, embedded.eos_token_ids, embedded.default_dataset)
    assert facts == (2, 1, {1}, "embedded") and not embedded.shifted


def test_a_hub_id_is_a_folder_of_the_cache_without_pickle(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or folder,
    )
    add_adapter(load_denoiser("some-one/Some.Model-8B"), tmp_path / "adapter")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.py"]
    assert asked == [("some-one/Some.Model-8B", patterns)]
    load_denoiser(tmp_path / "adapter")
    assert len(asked) == 2 and asked[0] == asked[1]


@pytest.mark.parametrize(("option", "wanted"), [("auto", "eager"), ("eager", "eager"), ("sdpa", "sdpa")])
def test_attention_on_a_cpu(folder, option, wanted):
    assert load_denoiser(folder, "cpu", attention=option).model.config._attn_implementation == wanted


@torch.no_grad()
def test_device_map(folder):
    denoiser = load_denoiser(folder, device_map="auto")
    assert denoiser.device == denoiser.model.lm_head.weight.device
    tokens = some_tokens(20)
    assert close(denoiser.logits(tokens[None].to(denoiser.device))[0].cpu(), reference(folder, tokens), 0.2)


@torch.no_grad()
def test_save_and_load_again(folder, tmp_path):
    denoiser = load_denoiser(folder)
    for _ in range(2):  # also over itself
        denoiser.save(tmp_path / "saved")
        again = load_denoiser(tmp_path / "saved")
        for name in ("mask_token_id eos_token_id eos_token_ids context_length default_dataset shifted").split():
            assert getattr(again, name) == getattr(denoiser, name)
        text = "What is 2 + 2?<|endoftext|>~ü"
        assert again.tokenizer(text)["input_ids"] == denoiser.tokenizer(text)["input_ids"]
        assert again.tokenizer.chat_template == denoiser.tokenizer.chat_template
        assert close(again.logits(some_tokens(20)[None])[0], reference(folder, some_tokens(20)))
        denoiser = again
    assert "auto_map" not in "".join(path.read_text() for path in (tmp_path / "saved").glob("*.json"))


def test_a_model_of_ones_own(embedded):
    config = type(embedded.model.config)(**embedded.model.config.to_diff_dict())
    del config.end_token_ids, config.fill_token_id, config.shifted, config.default_dataset, config.mask_token_id
    denoiser = PretrainedDenoiser(type(embedded.model)(config), embedded.tokenizer)
    assert (denoiser.mask_token_id, denoiser.eos_token_ids, denoiser.default_dataset) == (2, {1}, "embedded")


# In the environment


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_environment_decodes(temperature, folder, data):
    options = {"denoiser": str(folder), "dataset": data, "gen_length": 16, "temperature": temperature}
    env = gym.make_vec("MaskedDiffusion-GSM8K-v0", num_envs=2, split="test", **options)
    observation, _ = env.reset(seed=0, options={"problem": [0, 1]})
    for _ in range(16):
        observation, _, terminated, _, info = env.step(observation["eligible"])
        if terminated.any():
            break
    assert terminated.all()
    assert (info["final_info"]["nfe"] == 1).all()

    denoiser = load_denoiser(folder)
    task = dllm_gym.make_task("gsm8k", data, "test")
    for row in range(2):
        message = [{"role": "user", "content": task[row].prompt}]
        prompt = denoiser.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
        logits = reference(folder, torch.tensor([*prompt, *[denoiser.mask_token_id] * 16]))[-16:]
        logits[:, denoiser.mask_token_id] = -torch.inf
        best = logits.argmax(dim=-1).tolist()
        length = next((i for i, token in enumerate(best) if token in denoiser.eos_token_ids), 16)
        greedy = denoiser.tokenizer.decode(best[:length], skip_special_tokens=True)
        assert (info["final_info"]["completion"][row] == greedy) == (temperature == 0)


@pytest.mark.parametrize(
    ("kind", "token", "ends"),
    [
        *(("llada", token, token in LLADA_ENDS) for token in (256, *LLADA_ENDS)),
        *(("dream", token, token in DREAM_ENDS) for token in (257, *DREAM_ENDS)),
    ],
)
def test_every_end_token_ends_a_completion(kind, token, ends, folders, data, monkeypatch):
    denoiser = load_denoiser(folders[kind])
    certain = F.one_hot(torch.tensor(token), denoiser.vocab_size).float() * 50
    monkeypatch.setattr(denoiser, "head", lambda features: certain.repeat(len(features), 1))
    env = gym.make("MaskedDiffusion-GSM8K-v0", denoiser=denoiser, dataset=data, gen_length=16, observe=("token",))
    env.reset(seed=0)
    first = torch.arange(16).numpy() == 0
    observation, _, terminated, _, info = env.step(first)
    assert terminated == ends
    if ends:
        assert info["completion"] == "" and observation["token"].tolist() == [token] + [denoiser.eos_token_id] * 15


# Adapters


def add_adapter(denoiser, folder=None):
    """LoRA with weights that change something."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    denoiser.model = get_peft_model(denoiser.model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in denoiser.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    if folder is not None:
        denoiser.save(folder)
    return denoiser


@torch.no_grad()
def test_an_adapter_is_saved_and_loaded_on_its_base(folder, tmp_path):
    tokens = some_tokens(20)[None]
    base = load_denoiser(folder).logits(tokens)
    trained = add_adapter(load_denoiser(folder), tmp_path / "adapter")
    changed = trained.logits(tokens)
    assert (changed - base).abs().max() > 0.1
    with trained.model.disable_adapter():
        assert torch.equal(trained.logits(tokens), base)

    names = sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors"))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert names == ["adapter_model.safetensors"] and config["base_model_name_or_path"] == str(folder)
    again = load_denoiser(tmp_path / "adapter")
    assert close(again.logits(tokens), changed) and not any(p.requires_grad for p in again.model.parameters())
    assert (again.default_dataset, again.eos_token_ids) == ("hub", trained.eos_token_ids)
    with again.model.disable_adapter():
        assert close(again.logits(tokens), base)

    assert again.merge() is again and again.model is again.causal_lm
    again.merge().save(tmp_path / "merged")
    merged = load_denoiser(tmp_path / "merged")
    assert close(merged.logits(tokens), changed) and not any(p.requires_grad for p in again.model.parameters())


def test_an_adapter_brings_its_own_tokenizer_and_template(folder, tmp_path):
    denoiser = load_denoiser(folder)
    base = denoiser.tokenizer.chat_template
    denoiser.tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    add_adapter(denoiser, tmp_path / "adapter")
    again = load_denoiser(tmp_path / "adapter")
    assert again.tokenizer.chat_template == denoiser.tokenizer.chat_template != base
    assert again.tokenizer("What?")["input_ids"] == denoiser.tokenizer("What?")["input_ids"]
    for path in (tmp_path / "adapter").iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    assert load_denoiser(tmp_path / "adapter").tokenizer.chat_template == base


def test_a_chat_template_that_fails(copy, data):
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": "{{ raise_exception('no system message') }}"}))
    with pytest.raises(ValueError, match=r"denoiser '.*': the chat template .* problem '.*' \(.*no system message\)"):
        gym.make("MaskedDiffusion-GSM8K-v0", denoiser=str(copy), dataset=data, gen_length=8)


def test_a_tokenizer_that_is_not_that_of_the_weights(kind, tmp_path):
    """Prompts with a token beyond the embedding's rows."""
    special = {"llada": LLADA_SPECIAL, "dream": DREAM_SPECIAL}[kind]
    rows = 256 + len(special) - 1
    sizes = {"vocab_size": rows, "mask_token_id": 5} | ({"embedding_size": rows} if kind == "llada" else {})
    folder = WRITERS[kind](tmp_path / "small", **sizes)
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": f"What is {special[-1]}?", "answer": "#### 4"}))
    said = f"its token {rows} ({special[-1]!r}) is beyond the {rows} tokens of denoiser {str(folder)!r}"
    with pytest.raises(ValueError, match=re.escape(said)):
        gym.make("MaskedDiffusion-GSM8K-v0", denoiser=str(folder), dataset=str(path), gen_length=8)


def test_an_adapter_on_the_embedded_denoiser_in_the_environment(tmp_path):
    add_adapter(load_denoiser("embedded", dtype="float32"), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "embedded"
    env = gym.make("MaskedDiffusion-Countdown-v0", denoiser=str(tmp_path / "adapter"), dtype="float32")
    plain = gym.make("MaskedDiffusion-Countdown-v0", dtype="float32")
    confidence, other = (e.reset(seed=0)[0]["confidence"] for e in (env, plain))
    assert abs(confidence - other).max() > 0.01


def test_gradients_reach_the_adapter_and_nothing_else(folder):
    denoiser = add_adapter(load_denoiser(folder))
    tokens, mask = decoding.pad_left([some_tokens(9), some_tokens(5)])
    denoiser.logits(tokens, mask).log_softmax(dim=-1)[..., 7].sum().backward()
    for name, parameter in denoiser.model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == ("lora_" in name), name


# Errors


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("missing", lambda weights, name: weights.pop(name)),
        ("not used", lambda weights, name: weights.update({name + ".more": weights[name].clone()})),
        ("of another shape", lambda weights, name: weights.update({name: weights[name][:-1].clone()})),
    ],
)
@pytest.mark.parametrize("part", ["layer", "head"])
def test_weights_that_do_not_fit(part, what, change, kind, copy):
    names = {
        "llada": {"layer": "model.transformer.blocks.1.ff_out.weight", "head": "model.transformer.ff_out.weight"},
        "dream": {"layer": "model.layers.1.self_attn.q_proj.bias", "head": "lm_head.weight"},
    }
    name = names[kind][part]
    change_weights(copy, lambda weights: change(weights, name))
    message = error_of(ValueError, copy)
    assert message.startswith(f"denoiser={str(copy)!r}") and f": {what}: {name}" in message


def test_many_wrong_weights_are_one_short_line(copy):
    change_weights(copy, lambda weights: [weights.pop(name) for name in list(weights)[:-2]])
    message = error_of(ValueError, copy)
    assert " more" in message and len(message) < 400 + len(str(copy))


def test_missing_shard(kind, tmp_path):
    folder = WRITERS[kind](tmp_path / "sharded", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 shards are not there: model-00002-of-00003.safetensors" in error_of(ValueError, folder)


def test_pickled_weights_are_never_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    message = error_of(ValueError, copy)
    assert "pytorch_model.bin" in message and "convert" in message
    (copy / "pytorch_model.bin").unlink()
    assert "no weights" in error_of(ValueError, copy)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "'llada', 'Dream'"]),
        ({"mask_token_id": None}, ["no mask token"]),
        ({"mask_token_id": 272}, ["token 272", "272 logits"]),
        ({"alibi": True}, ["alibi=True"]),
        ({"rope": False}, ["rope=False"]),
        ({"activation_type": "swiglu"}, ["activation_type='swiglu'", "'silu'"]),
        ({"block_type": "sequential", "include_bias": True}, ["block_type='sequential'", "include_bias=True"]),
        ({"include_qkv_bias": True}, ["include_qkv_bias=True"]),
        ({"layer_norm_type": "default"}, ["layer_norm_type='default'", "'rms'"]),
        ({"n_heads": None}, ["lacks n_heads"]),
        ({"rope_theta": None, "d_model": None}, ["lacks d_model, rope_theta"]),
        ({"embedding_size": 263}, ["embedding_size=263", "vocab_size=264"]),
        ({"n_heads": 5}, ["config.json cannot be read"]),
    ],
)
def test_configs_that_cannot_be_read(changes, parts, folders, tmp_path):
    folder = shutil.copytree(folders["llada"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    message = error_of(ValueError, folder)
    assert [part for part in (f"denoiser={str(folder)!r}", *parts) if part not in message] == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' (can be read: 'silu')"),
        ({"rope_scaling": {"type": "yarn"}}, "'factor'"),
        ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "its type must be one of"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta 1000000.0 and 7.0"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ({"head_dim": 16}, "head_dim=16"),
        ({"my_gate": 2}, "could change what the model computes: my_gate=2"),
        ({"mask_token_id": "260"}, "mask_token_id='260': a token is a whole number"),
        ({"eos_token_id": [256, 256.0]}, "eos_token_id=[256, 256.0]: a token is a whole number"),
        ({"pad_token_id": -1}, "pad_token_id=-1: a token is a whole number"),
    ],
)
def test_dream_configs_that_cannot_be_read(changes, named, folders, tmp_path):
    folder = shutil.copytree(folders["dream"], tmp_path / "copy")
    change_config(folder, **changes)
    assert named in error_of(ValueError, folder)


@pytest.mark.parametrize(
    "changes", [{"quantization_config": {"bits": 4}}, {"use_sliding_window": True}, {"my_gate": 2}]
)
def test_saved_configs_that_cannot_be_read(changes, folders, tmp_path):
    load_denoiser(folders["dream"]).save(tmp_path / "saved")
    change_config(tmp_path / "saved", **changes)
    (name,) = changes
    assert f"{name}={changes[name]!r}" in error_of(ValueError, tmp_path / "saved")


def test_fields_that_change_nothing(folder, kind, tmp_path):
    """Those of the published configs and of other versions of transformers; and whatever says nothing."""
    tokens = some_tokens(20)[None]
    written = shutil.copytree(folder, tmp_path / "copy")
    changes = {
        "transformers_version": "9.9",
        "dtype": "bfloat16",
        "clip_qkv": None,
        "quantization_config": None,
        "new": None,
    }
    changes |= {"layer_types": ["full_attention"] * 2, "chunk_size_feed_forward": 0, "use_cache": True}
    if kind == "llada":
        changes |= {"alibi_bias_max": 8.0, "embedding_dropout": 0.0, "residual_dropout": 0.0, "precision": "amp_bf16"}
        changes |= {"init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "flash_attention": False}
        changes |= {"attention_layer_norm_with_affine": True, "init_cutoff_factor": None}
    change_config(written, **changes)
    assert torch.equal(load_denoiser(written).logits(tokens), load_denoiser(folder).logits(tokens))


SCALING = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("name", SCALING)
@torch.no_grad()
def test_rope_scaling_is_done(name, folder, kind, tmp_path):
    """As by the transformers class with the same parameters; written as transformers 4 or 5 write it."""
    tokens = some_tokens(200)[None]
    plain = load_denoiser(folder)
    theta = plain.model.config.rope_parameters["rope_theta"]
    parameters = {"rope_type": name, "rope_theta": theta, **SCALING[name]}
    model = type(plain.model)(
        type(plain.model.config).from_dict(plain.model.config.to_dict() | {"rope_parameters": parameters})
    )
    model.load_state_dict(plain.model.state_dict())
    wanted = PretrainedDenoiser(model.eval(), plain.tokenizer).logits(tokens)
    assert close(wanted, plain.logits(tokens), 1e-3) == (name == "dynamic")  # which begins beyond the context
    for i, (changes, dropped) in enumerate(
        [
            ({"rope_scaling": {"type": name, **SCALING[name]}}, ()),
            ({"rope_scaling": {"rope_type": name, **SCALING[name]}}, ()),
            ({"rope_parameters": parameters}, ("rope_theta", "rope_scaling")),
        ]
    ):
        written = shutil.copytree(folder, tmp_path / f"copy{i}")
        change_config(written, *dropped, **changes)
        assert close(load_denoiser(written).logits(tokens), wanted)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_checkpoint_with_a_head(equal, kind, tmp_path):
    tied = {"llada": "weight_tying", "dream": "tie_word_embeddings"}[kind]
    folder = WRITERS[kind](tmp_path / "tied", **{tied: True})
    wanted = load_denoiser(folder).logits(some_tokens(9)[None])
    embedding = {"llada": "model.transformer.wte.weight", "dream": "model.embed_tokens.weight"}[kind]
    head = {"llada": "model.transformer.ff_out.weight", "dream": "lm_head.weight"}[kind]
    weights = load_file(folder / "model.safetensors")
    weights[head] = weights[embedding].clone() + (0 if equal else 1)
    save_file(weights, folder / "model.safetensors")
    if equal:
        assert torch.equal(load_denoiser(folder).logits(some_tokens(9)[None]), wanted)
    else:
        assert f"ties the head to the embedding, but {head} is another matrix" in error_of(ValueError, folder)


def change_config(folder, *dropped: str, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in dropped}))


def test_no_end_token(folders, tmp_path):
    folder = shutil.copytree(folders["llada"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None, "pad_token_id": None}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("endoftext", "one").replace("eot_id", "two").replace("eos_", "other_"))
    assert "no end token" in error_of(ValueError, folder)


def test_no_tokenizer(kind, copy):
    (copy / {"llada": "tokenizer.json", "dream": "merges.txt"}[kind]).unlink()
    assert "no tokenizer" in error_of(ValueError, copy)


def test_folders_and_hub_ids_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the variable is read on import
    message = error_of(FileNotFoundError, "nobody/no-such-model")
    assert all(part in message for part in ("denoiser='nobody/no-such-model'", "hf download", "give the folder"))
    assert "'embedded'" in error_of(FileNotFoundError, "no-such-model")
    assert "neither config.json nor adapter_config.json" in error_of(FileNotFoundError, tmp_path)


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device='gpu': must be 'auto', 'cpu'" in error_of(ValueError, "embedded", device="gpu")
    assert "device='cuda:1': torch sees no CUDA device" in error_of(ValueError, "embedded", device="cuda:1")


def test_arguments_that_are_not_allowed(folder):
    assert "'float7'" in error_of(ValueError, folder, dtype="float7")
    assert "torch.int64" in error_of(ValueError, folder, dtype=torch.int64)
    assert "'flash'" in error_of(ValueError, folder, attention="flash")
    assert "device_map" in error_of(ValueError, folder, device="cpu", device_map="auto")


def test_flash_attention_that_is_not_installed(folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    assert "not installed" in error_of(ValueError, folder, attention="flash_attention_2")


def test_adapters_that_cannot_be_loaded(kind, copy, tmp_path):
    adapter = tmp_path / "adapter"
    add_adapter(load_denoiser(copy), adapter)
    # Clones: older safetensors map the file, which is written over here.
    weights = {name: weight.clone() for name, weight in load_file(adapter / "adapter_model.safetensors").items()}
    name = sorted(weights)[0]
    save_file({n: w for n, w in weights.items() if n != name}, adapter / "adapter_model.safetensors")
    assert f"missing: {name}" in error_of(ValueError, adapter)
    save_file(weights | {name: weights[name][:, :-1].clone()}, adapter / "adapter_model.safetensors")
    assert f"of another shape: {name}" in error_of(ValueError, adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "never read" in error_of(ValueError, adapter)
    save_file(weights, adapter / "adapter_model.safetensors")

    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copytree(adapter, tmp_path / "second")
    for base, part in ((str(adapter), "is an adapter itself"), (None, "no base_model_name_or_path")):
        changed = json.dumps(config | {"base_model_name_or_path": base})
        (tmp_path / "second/adapter_config.json").write_text(changed)
        assert part in error_of(ValueError, tmp_path / "second")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path=str(copy))
    prompt.save_pretrained(tmp_path / "second")
    assert "PROMPT_TUNING" in error_of(ValueError, tmp_path / "second")

    shutil.rmtree(copy)
    message = error_of(FileNotFoundError, adapter)
    assert str(adapter) in message and str(copy) in message


def test_a_prompt_longer_than_the_context(data, tmp_path):
    folder = write_llada(tmp_path / "short", max_sequence_length=40)
    with pytest.raises(ValueError, match="exceed the denoiser's context of 40 tokens"):
        gym.make("MaskedDiffusion-GSM8K-v0", denoiser=str(folder), dataset=data, gen_length=16)
