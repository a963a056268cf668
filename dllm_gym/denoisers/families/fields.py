"""Config fields that families share. One counts only if it is known: another could change what the model computes."""

from __future__ import annotations

from collections.abc import Iterable

HARMLESS = {
    *("model_type", "architectures", "auto_map", "_name_or_path", "name_or_path", "transformers_version"),
    *("torch_dtype", "dtype", "use_cache", "is_causal", "return_dict", "output_attentions", "output_hidden_states"),
    *("chunk_size_feed_forward", "problem_type", "id2label", "label2id", "tokenizer_class", "max_length"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"),
    *("end_token_ids", "fill_token_id", "shifted", "default_dataset", "attention_pattern", "block_size"),
}
"""Fields that change nothing of the forward pass, or are read elsewhere here."""

SHARED_FIXED: dict[str, list] = {
    "attention_dropout": [0.0],
    "attention_bias": [False],
    "mlp_bias": [False],
    "is_encoder_decoder": [False],
    "pretraining_tp": [1],
    "quantization_config": [None],
    "clip_qkv": [None],
}

ROPE_FIELDS = ["rope_theta", "rope_scaling", "rope_parameters"]


def shared_settings(given: str, raw: dict) -> dict:
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
        raise ValueError(f"{given}: config.json contradicts itself about its rotary embedding: {said}.")
    parameters = {"rope_type": "default"} | older | newer
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = ["default", *ROPE_INIT_FUNCTIONS]
    if parameters["rope_type"] not in known:
        name = "rope_scaling" if scaling else "rope_parameters"
        raise ValueError(f"{given}: config.json has {name}={raw[name]!r}: its type must be one of {known}.")
    return parameters


def read_as(given: str, raw: dict, model_class, config_class, harmless: Iterable[str]) -> tuple:
    """A checkpoint whose config.json has the fields of a transformers class, with ``is_causal`` false."""
    fields = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    ]
    known = config_class().to_dict().keys() - HARMLESS
    fixed = {**SHARED_FIXED, "hidden_act": ["silu"], "use_sliding_window": [False, None]}
    require_fields(given, raw, fields)
    require_known(given, raw, {*known, *harmless, *ROPE_FIELDS}, fixed)
    settings = {name: raw[name] for name in known & raw.keys() if name not in (*harmless, *ROPE_FIELDS, "layer_types")}
    return model_class, config_class(**settings | shared_settings(given, raw), is_causal=False)


def require_fields(given: str, raw: dict, fields: Iterable[str]) -> None:
    theta = raw.get("rope_theta", (raw.get("rope_parameters") or {}).get("rope_theta"))
    found = raw | {"rope_theta": theta}
    if lacking := [name for name in (*fields, "rope_theta") if found.get(name) is None]:
        raise ValueError(f"{given}: config.json lacks {', '.join(lacking)}.")


def require_known(given: str, raw: dict, known: set[str], fixed: dict[str, list]) -> None:
    """Refuse fields whose value the transformers class does not have, and fields that nobody here knows."""
    fixed = fixed | {"layer_types": [["full_attention"] * len(raw.get("layer_types") or [])]}
    other = {n: raw[n] for n, allowed in fixed.items() if raw.get(n) is not None and raw[n] not in allowed}
    unknown = {name: raw[name] for name in raw.keys() - known - fixed.keys() - HARMLESS if raw[name] is not None}
    if unknown:
        said = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
        raise ValueError(
            f"{given}: config.json has fields that are not known, which could change what the model computes: {said}."
        )
    if other:
        said = ", ".join(f"{name}={value!r} (can be read: {fixed[name][0]!r})" for name, value in other.items())
        raise ValueError(f"{given}: config.json has values that its transformers class cannot express: {said}.")
