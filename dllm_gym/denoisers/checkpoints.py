"""Checkpoints of masked diffusion language models, read onto transformers' own classes.

LLaDA (arXiv 2502.09992) is a Llama and Dream (arXiv 2508.15487) a Qwen2, both without a causal mask, so nothing that a
checkpoint folder brings is ever run: no remote code, no pickle. Reading is strict: a config that the class cannot
express, a weight that is missing, left over or of another shape are errors, never a warning.

A config field counts only if it is known here: an unknown one could change what the model computes.

Every function takes `given`, how the user named the checkpoint, to begin its errors with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {"embedded": ASSETS / "embedded", "embedded-early": ASSETS / "embedded-early"}

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.layers": "model.transformer.blocks",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""What transformers' Llama calls a module, and what LLaDA calls it."""

HARMLESS = {
    *("model_type", "architectures", "auto_map", "_name_or_path", "name_or_path", "transformers_version"),
    *("torch_dtype", "dtype", "use_cache", "is_causal", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "problem_type", "id2label", "label2id", "tokenizer_class", "max_length"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"),
    *("end_token_ids", "fill_token_id", "shifted", "default_dataset"),
}
"""Fields that change nothing of the forward pass, or are read elsewhere here."""
SHARED_FIXED = {
    "attention_dropout": [0.0],
    "attention_bias": [False],
    "mlp_bias": [False],
    "is_encoder_decoder": [False],
    "pretraining_tp": [1],
    "quantization_config": [None],
    "clip_qkv": [None],
}
LLADA_FIELDS = "d_model n_layers n_heads vocab_size max_sequence_length rms_norm_eps".split()
LLADA_FIXED = {
    "block_type": ["llama"],
    "block_group_size": [1],
    "activation_type": ["silu"],
    "layer_norm_type": ["rms"],
    "layer_norm_with_affine": [True],
    "bias_for_layer_norm": [False, None],
    "attention_layer_norm": [False],
    "input_emb_norm": [False],
    "include_bias": [False],
    "include_qkv_bias": [False, None],
    "rope": [True],
    "alibi": [False],
    "scale_logits": [False],
    "embedding_dropout": [0.0],
    "residual_dropout": [0.0],
    **SHARED_FIXED,
}
"""What makes a LLaDA config a Llama: the values of the published checkpoints, assumed where a field is absent."""
LLADA_HARMLESS = {
    *("embedding_size", "mlp_hidden_size", "mlp_ratio", "n_kv_heads", "multi_query_attention", "weight_tying"),
    *("alibi_bias_max", "attention_layer_norm_with_affine", "rope_full_precision", "flash_attention", "precision"),
    *("init_device", "init_fn", "init_std", "init_cutoff_factor"),
}

ROPE_FIELDS = ["rope_theta", "rope_scaling", "rope_parameters"]
DREAM_FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
]
DREAM_FIXED = {
    "hidden_act": ["silu"],
    "use_sliding_window": [False, None],
    "use_mrope": [False, None],
    **SHARED_FIXED,
}
DREAM_HARMLESS = {"tie_word_embeddings", "max_window_layers", "sliding_window"}

END_TOKENS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>")
"""Tokens that end a completion wherever the tokenizer has them; the first fills the canvas after it."""


def find_folder(given: str, name_or_path: str | Path) -> tuple[Path, str]:
    """The folder of a checkpoint, from the hub if need be, and the name that stands for it in an adapter's config."""
    name, path = str(name_or_path), Path(name_or_path)
    if name in EMBEDDED:
        return EMBEDDED[name], name
    local = path.is_dir()
    if not local:
        path = _download(given, name)
    elif (path / "denoiser").is_dir():  # a run's folder
        path = path / "denoiser"
    if not any((path / file).is_file() for file in ("config.json", ADAPTER)):
        raise FileNotFoundError(f"{given}: {path} has neither config.json nor {ADAPTER}.")
    return path, str(path.resolve()) if local else name


def read_json(given: str, path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{given}: {path.name} is not JSON ({error}).") from None


def read_config(given: str, folder: Path, raw: dict):
    """The transformers class and config of a checkpoint, and how the checkpoint names the class's modules.

    Args:
        raw: what config.json says.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kind = raw.get("model_type")
    given = f"{given}: model_type={kind!r}"
    with reading(given, "config.json"):
        if kind == "llada":
            return LlamaForCausalLM, LlamaConfig(**_llada_settings(given, raw), is_causal=False), LLADA_NAMES
        if kind == "Dream":
            return Qwen2ForCausalLM, Qwen2Config(**_dream_settings(given, raw), is_causal=False), {}
        ours = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
        if kind in ours and not raw.get("is_causal", True):
            model_class, config_class = ours[kind]
            fixed = {"quantization_config": [None], "use_sliding_window": [False, None]}
            _require_known(given, raw, {*config_class().to_dict(), "rope_scaling", "rope_theta"}, fixed)
            return model_class, config_class.from_pretrained(folder, local_files_only=True), {}
    raise ValueError(
        f"{given}, is_causal={raw.get('is_causal', True)}; can be read: model_type 'llada', 'Dream', and 'llama' or "
        f"'qwen2' with is_causal false, as `train_policy.py sft` and `PretrainedDenoiser.save` write it."
    )


def read_tokenizer(given: str, folder: Path):
    """The tokenizer of tokenizer.json, or else Qwen2's on vocab.json and merges.txt. Classes of its own are not run."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    whole = (folder / "tokenizer.json").is_file()
    if not whole and not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise ValueError(f"{given}: no tokenizer: neither tokenizer.json nor vocab.json with merges.txt.")
    with reading(given, "tokenizer"), quiet():
        tokenizer = (PreTrainedTokenizerFast if whole else Qwen2Tokenizer).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # a saved copy must not point to remote code either
    return tokenizer


def set_tokens(given: str, config, raw: dict, tokenizer) -> None:
    """Write into a transformers config what decoding needs to know, so that it is saved with the model.

    `mask_token_id`; `end_token_ids`, every token that ends a completion; `fill_token_id`, the one that fills the canvas
    after it; `shifted`, whether column i - 1 predicts token i; `default_dataset`. A folder that has been saved from
    here has them; one of `train_policy.py sft` ends with its tokenizer's end token and reads embedded problems.
    """
    ends, fill = [tokenizer.eos_token_id], tokenizer.eos_token_id
    original = raw["model_type"] in ("llada", "Dream")
    if original:
        vocabulary = tokenizer.get_vocab()
        named = [vocabulary[token] for token in END_TOKENS if token in vocabulary]
        eos, pad = raw.get("eos_token_id"), raw.get("pad_token_id")
        ends += [*named, pad, *(eos if isinstance(eos, list) else [eos])]
        fill = next((token for token in (*named[:1], pad, *ends) if token is not None), None)
    mask = raw.get("mask_token_id")
    for name in ("mask_token_id", "eos_token_id", "pad_token_id", "fill_token_id", "end_token_ids"):
        value = raw.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and (type(token) is not int or token < 0):
                raise ValueError(f"{given}: config.json has {name}={value!r}: a token is a whole number, 0 or more.")
    config.mask_token_id = tokenizer.mask_token_id if mask is None else mask
    config.end_token_ids = raw.get("end_token_ids", sorted(set(ends) - {None, config.mask_token_id}))
    config.fill_token_id = raw.get("fill_token_id", fill)
    config.shifted = raw.get("shifted", raw["model_type"] == "Dream")
    config.default_dataset = raw.get("default_dataset", "hub" if original else "embedded")
    if config.mask_token_id is None:
        raise ValueError(f"{given}: no mask token: config.json has no mask_token_id and the tokenizer no mask token.")
    if not config.end_token_ids or config.fill_token_id is None:
        raise ValueError(f"{given}: no end token: config.json has no eos_token_id and the tokenizer no end token.")
    if (largest := max(config.mask_token_id, config.fill_token_id, *config.end_token_ids)) >= config.vocab_size:
        raise ValueError(f"{given}: token {largest} (mask or end) is beyond the {config.vocab_size} logits.")


def read_weights(given: str, folder: Path, model_class, config, names: dict[str, str]) -> dict[str, Tensor]:
    """All weights under transformers' names, checked against the config. They are views of the files, not copies."""
    found: dict[str, Tensor] = {}
    for path in _weight_files(given, folder):
        with reading(given, path.name):
            found |= read_safetensors(path)
    with reading(given, "config.json"), torch.device("meta"):
        expected = model_class(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        head, embedding = (_original_name(f"{name}.weight", names) for name in ("lm_head", "model.embed_tokens"))
        both = head in found and embedding in found
        if both and not torch.equal(found.pop(head), found[embedding]):
            raise ValueError(f"{given}: config.json ties the head to the embedding, but {head} is another matrix.")
    originals = {name: _original_name(name, names) for name in expected}
    require_fit(given, "config.json", {originals[name]: weight for name, weight in expected.items()}, found)
    return {name: found[original] for name, original in originals.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def require_fit(given: str, whose: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Refuse weights unless names and shapes are exactly the expected ones."""
    misshapen = [
        f"{name} {list(found[name].shape)} instead of {list(weight.shape)}"
        for name, weight in expected.items()
        if name in found and found[name].shape != weight.shape
    ]
    wrong = {
        "missing": sorted(expected.keys() - found.keys()),
        "not used": sorted(found.keys() - expected.keys()),
        "of another shape": misshapen,
    }
    if any(wrong.values()):
        said = "; ".join(f"{kind}: {_some(names)}" for kind, names in wrong.items() if names)
        raise ValueError(f"{given}: the weights do not fit {whose}: {said}.")


@contextmanager
def reading(given: str, what: str):
    """Errors of libraries as one line of ours."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(given):
            raise
        raise ValueError(f"{given}: {what} cannot be read ({_first_line(error)}).") from error


@contextmanager
def quiet():
    """Without transformers' loading bars and reports: what is wrong becomes an error here."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _download(given: str, name: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"{given}: must be one of {sorted(EMBEDDED)}, a folder with config.json or {ADAPTER}, "
            f"or a hub id 'owner/name'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        raise FileNotFoundError(
            f"{given}: no such folder, and the hub does not give it ({type(error).__name__}: {_first_line(error)}). "
            f"Download it where there is a network (`hf download {name}`) and give the folder."
        ) from error


def _llada_settings(given: str, raw: dict) -> dict:
    _require_fields(given, raw, LLADA_FIELDS)
    _require_known(given, raw, {*LLADA_FIELDS, *LLADA_HARMLESS, *ROPE_FIELDS}, LLADA_FIXED)
    heads, width = raw["n_heads"], raw["d_model"]
    rows = raw.get("embedding_size") or raw["vocab_size"]  # the embedding may be padded beyond the vocabulary
    if rows < raw["vocab_size"]:
        raise ValueError(f"{given}: embedding_size={rows} is less than vocab_size={raw['vocab_size']}.")
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": raw.get("mlp_hidden_size") or raw["mlp_ratio"] * width,
        "num_hidden_layers": raw["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else heads),
        "max_position_embeddings": raw["max_sequence_length"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "tie_word_embeddings": raw.get("weight_tying", False),
        **_shared_settings(given, raw),
    }


def _dream_settings(given: str, raw: dict) -> dict:
    _require_fields(given, raw, DREAM_FIELDS)
    _require_known(given, raw, {*DREAM_FIELDS, *DREAM_HARMLESS, *ROPE_FIELDS}, DREAM_FIXED)
    tied = raw.get("tie_word_embeddings", False)
    return {name: raw[name] for name in DREAM_FIELDS} | {"tie_word_embeddings": tied} | _shared_settings(given, raw)


def _shared_settings(given: str, raw: dict) -> dict:
    # No pad token: it would become the embedding's padding index, whose gradient is cut, and here it is a real token.
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {"rope_parameters": _rope_parameters(given, raw), **tokens}


def _rope_parameters(given: str, raw: dict) -> dict:
    """`rope_parameters` of transformers 5, or what older versions wrote: `rope_theta` and `rope_scaling`."""
    scaling = dict(raw.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    older = {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}
    older |= scaling
    newer = raw.get("rope_parameters") or {}
    other = [name for name in older.keys() & newer.keys() if older[name] != newer[name]]
    if other:
        said = ", ".join(f"{name} {older[name]!r} and {newer[name]!r}" for name in sorted(other))
        raise ValueError(f"{given}: config.json says two things of its rotary embedding: {said}.")
    parameters = {"rope_type": "default"} | older | newer
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = ["default", *ROPE_INIT_FUNCTIONS]
    if parameters["rope_type"] not in known:
        name = "rope_scaling" if scaling else "rope_parameters"
        raise ValueError(f"{given}: config.json has {name}={raw[name]!r}: its type must be one of {known}.")
    return parameters


def _require_fields(given: str, raw: dict, fields: Iterable[str]) -> None:
    theta = raw.get("rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta"))
    found = raw | {"rope_theta": theta}
    if lacking := [name for name in (*fields, "rope_theta") if found.get(name) is None]:
        raise ValueError(f"{given}: config.json lacks {', '.join(lacking)}.")


def _require_known(given: str, raw: dict, known: set[str], fixed: dict[str, list]) -> None:
    """Refuse fields whose value the transformers class does not have, and fields that nobody here knows."""
    fixed = fixed | {"layer_types": [["full_attention"] * len(raw.get("layer_types") or [])]}
    other = {n: raw[n] for n, allowed in fixed.items() if raw.get(n) is not None and raw[n] not in allowed}
    unknown = {name: raw[name] for name in raw.keys() - known - fixed.keys() - HARMLESS if raw[name] is not None}
    if unknown:
        said = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
        raise ValueError(f"{given}: config.json has what is not known to change nothing: {said}.")
    if other:
        said = ", ".join(f"{name}={value!r} (can be read: {fixed[name][0]!r})" for name, value in other.items())
        raise ValueError(f"{given}: config.json asks for what its transformers class does not have: {said}.")


def _weight_files(given: str, folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        said = f" Pickled weights are never read ({_some(pickled)}): convert them to safetensors." if pickled else ""
        raise ValueError(f"{given}: no weights: neither model.safetensors nor {INDEX}.{said}")
    with reading(given, INDEX):
        shards = sorted(set(read_json(given, folder / INDEX)["weight_map"].values()))
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise ValueError(f"{given}: {len(absent)} of {len(shards)} shards are not there: {_some(absent)}.")
    return [folder / name for name in shards]


def _original_name(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
