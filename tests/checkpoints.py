"""Tiny checkpoints with random weights, written as LLaDA, Dream, SDAR and A2D are published: files, fields, names."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
"""One token a byte, without merges: any text can be read. Special tokens follow from 256 on."""
LLADA_SPECIAL = "<|startoftext|> <|endoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|mdm_mask|>".split()
DREAM_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|beginoftext|> <|mask|>".split()
LLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DREAM_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_llada(folder: Path, *, shards: int = 1, seed: int = 0, dtype=torch.float32, **changes) -> Path:
    """A LLaDA folder: width 32, 2 layers, 4 heads, 264 tokens in 272 embeddings. `changes` go into config.json."""
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 32,
        "embedding_size": 272,
        "eos_token_id": 257,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 261,
        "max_sequence_length": 512,
        "mlp_hidden_size": 48,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "pad_token_id": 257,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "vocab_size": 264,
        "weight_tying": False,
    } | changes
    width, hidden = config["d_model"], config["mlp_hidden_size"]
    keys = width // config["n_heads"] * config["n_kv_heads"]
    shapes = {"wte": (config["embedding_size"], width), "ln_f": (width,), "ff_out": (config["embedding_size"], width)}
    if config["weight_tying"]:
        del shapes["ff_out"]
    for layer in range(config["n_layers"]):
        shapes |= {
            f"blocks.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (width,),
                "ff_norm": (width,),
                "q_proj": (width, width),
                "k_proj": (keys, width),
                "v_proj": (keys, width),
                "attn_out": (width, width),
                "ff_proj": (hidden, width),
                "up_proj": (hidden, width),
                "ff_out": (width, hidden),
            }.items()
        }
    weights = _random({f"model.transformer.{name}.weight": shape for name, shape in shapes.items()}, seed, dtype)
    _write(folder, config, weights, shards)

    _write_tokenizer(folder, LLADA_SPECIAL)
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": LLADA_TEMPLATE, **names},
    )
    return folder


QWEN_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|MASK|>".split()


def write_qwen(folder: Path, model_type: str = "sdar", *, seed: int = 0, dtype=torch.float32, **changes) -> Path:
    """An SDAR or A2D folder: width 32, 2 layers, 4 heads on 2 of keys, 264 tokens. `changes` go into config.json."""
    config = {
        "model_type": model_type,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "vocab_size": 264,
    }
    if model_type == "sdar":
        config |= {
            "architectures": ["SDARForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel"},
            "attn_implementation": "flex_attention",
            **dict.fromkeys(("debug", "micro_forward", "skip_checkpoint", "use_deepep"), False),
            **{"ep_size": 1, "fuse_cross_entropy": True, "mask_token_id": 259},
        }
    if model_type.endswith("llama"):
        config["mlp_bias"] = False
    else:
        config |= {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
    if model_type.endswith("qwen2"):
        del config["attention_bias"]
    normed = model_type in ("sdar", "a2d-qwen3")
    if normed:
        config["head_dim"] = 16
    config |= changes
    width, hidden, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = size * config["num_attention_heads"], size * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
    for layer in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
            "self_attn.q_proj.weight": (queries, width),
            "self_attn.k_proj.weight": (keys, width),
            "self_attn.v_proj.weight": (keys, width),
            "self_attn.o_proj.weight": (width, queries),
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
        }
        if normed:
            own |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
        if model_type.endswith("qwen2"):
            own |= {f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", queries), ("k", keys), ("v", keys))}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    _write(folder, config, _random(shapes, seed, dtype), shards=1)

    _write_tokenizer(folder, QWEN_SPECIAL)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": "<|MASK|>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "Qwen2Tokenizer", "chat_template": DREAM_TEMPLATE, **names},
    )
    return folder


def write_dream(folder: Path, *, shards: int = 1, seed: int = 0, dtype=torch.float32, **changes) -> Path:
    """A Dream folder: width 32, 2 layers, 4 heads on 2 of keys, 272 tokens. `changes` go into config.json."""
    config = {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "mask_token_id": 260,
        "max_position_embeddings": 512,
        "max_window_layers": 28,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 256,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 272,
    } | changes
    width, hidden, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (rows, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (rows, width),
    }
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm.weight": (width,),
                "post_attention_layernorm.weight": (width,),
                "self_attn.q_proj.weight": (width, width),
                "self_attn.q_proj.bias": (width,),
                "self_attn.k_proj.weight": (keys, width),
                "self_attn.k_proj.bias": (keys,),
                "self_attn.v_proj.weight": (keys, width),
                "self_attn.v_proj.bias": (keys,),
                "self_attn.o_proj.weight": (width, width),
                "mlp.gate_proj.weight": (hidden, width),
                "mlp.up_proj.weight": (hidden, width),
                "mlp.down_proj.weight": (width, hidden),
            }.items()
        }
    _write(folder, config, _random(shapes, seed, dtype), shards)

    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(BYTES)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|beginoftext|>"}
    tokenizer = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(256 + i): {"content": token, **plain} for i, token in enumerate(DREAM_SPECIAL)},
        "chat_template": DREAM_TEMPLATE,
        "mask_token": "<|mask|>",
        "unk_token": None,
        **names,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    return folder


def _write_tokenizer(folder: Path, special: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))


def _random(shapes: dict[str, tuple[int, ...]], seed: int, dtype) -> dict[str, Tensor]:
    """Weights of a size at which every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            values *= 0.5
        elif len(shape) == 1:
            values = 1 + 0.2 * values
        else:
            values *= 0.3 if "wte" in name or "embed" in name else shape[1] ** -0.5
        weights[name] = values.to(dtype)
    return weights


def _write(folder: Path, config: dict, weights: dict[str, Tensor], shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        part = {name: weight for name, weight in weights.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))
