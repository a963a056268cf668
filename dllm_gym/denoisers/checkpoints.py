"""Checkpoints of masked diffusion language models, read onto transformers' own classes.

LLaDA (arXiv 2502.09992) is a Llama and Dream (arXiv 2508.15487) a Qwen2, both without a causal mask, so nothing that a
checkpoint folder brings is ever run: no remote code, no pickle. Reading is strict: a config that the class cannot
express, a weight that is missing, left over or of another shape are errors, never a warning.

Every function takes `given`, how the user named the checkpoint, to begin its errors with.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dllm_gym.denoisers.attention import AttentionPattern
from dllm_gym.denoisers.families import Family
from dllm_gym.denoisers.layouts import SMALL, original_name
from dllm_gym.hub import download, is_hub_id

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {"embedded": ASSETS / "embedded", "embedded-early": ASSETS / "embedded-early"}

HUB_FILES = ["*.safetensors", *SMALL]
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


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


def read_config(given: str, folder: Path, raw: dict, family: Family):
    """The transformers class and config of a checkpoint; ``raw`` is what config.json says."""
    given = f"{given}: model_type={raw['model_type']!r}"
    with reading(given, "config.json"):
        return family.read(given, folder, raw)


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


def set_tokens(given: str, config, raw: dict, family: Family, tokenizer, block_size: int | None = None) -> None:
    """Write into a transformers config what decoding needs to know, so that it is saved with the model.

    `mask_token_id`; `end_token_ids`, every token that ends a completion; `fill_token_id`, the one that fills the canvas
    after it; `shifted`, whether column i - 1 predicts token i; `attention_pattern` and `block_size`; `default_dataset`.
    A folder that has been saved from here has them; one of `sft` ends with its tokenizer's end token and
    reads embedded problems.
    """
    ends, fill = [tokenizer.eos_token_id], tokenizer.eos_token_id
    if family.published:
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
    config.shifted = raw.get("shifted", family.shifted)
    config.attention_pattern = raw.get("attention_pattern", family.attention_pattern)
    config.block_size = raw.get("block_size", family.block_size) if block_size is None else block_size
    if block_size is not None:
        if not family.block_causal:
            raise ValueError(f"{given}: block_size={block_size}: {raw['model_type']} is bidirectional; leave it out.")
        config.attention_pattern = "block-causal"
    try:
        AttentionPattern(config.attention_pattern, config.block_size)
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None
    config.default_dataset = raw.get("default_dataset", "hub" if family.published else "embedded")
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
        head, embedding = (original_name(f"{name}.weight", names) for name in ("lm_head", "model.embed_tokens"))
        both = head in found and embedding in found
        if both and not torch.equal(found.pop(head), found[embedding]):
            raise ValueError(f"{given}: config.json ties the head to the embedding, but {head} is another matrix.")
    originals = {name: original_name(name, names) for name in expected}
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
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"{given}: must be one of {sorted(EMBEDDED)}, a folder with config.json or {ADAPTER}, "
            f"or a hub id 'owner/name'."
        )
    return download(given, name, HUB_FILES)


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


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
