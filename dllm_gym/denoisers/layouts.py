"""Published checkpoints in their own layout: the names of weights, and the files beside them.

A denoiser that was read from a published checkpoint keeps that checkpoint's small files (config, tokenizer, code) in
the folder `KEPT` beside transformers' own. So it can be written again as its authors publish it. The code is never run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor, nn

from dllm_gym.denoisers.families import Family, find_family

LAYOUTS = ("transformers", "original")
KEPT = "original"
"""Subfolder with the small files of the published checkpoint."""
PREFIX = "base_model.model."
"""What peft writes before the names of modules."""
SMALL = ("*.json", "*.txt", "*.jinja", "*.model", "*.py")
"""Names of the files of a checkpoint that are not weights."""


def check_layout(layout: str) -> None:
    """Raise ValueError for a layout that there is not."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: must be 'transformers' or 'original'.")


def originals_of(folder: Path, family: Family) -> Path | None:
    """Where the small files of the published checkpoint are that a folder was read from; None: it is none."""
    if family.published:
        return folder
    return folder / KEPT if (folder / KEPT / "config.json").is_file() else None


def copy_small_files(source: Path, target: Path) -> None:
    """Everything that is neither weights nor their index."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SMALL:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)


def original_name(name: str, names: dict[str, str]) -> str:
    """What a family calls the weight or module that transformers calls ``name``."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def write_original(model, originals: Path, folder: Path, block_size: int | None) -> None:
    """A transformers model as its family publishes it: small files as they were, weights under the family's names."""
    from huggingface_hub import save_torch_state_dict

    copy_small_files(originals, folder)
    path = originals / "config.json"
    raw = json.loads(path.read_text())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    changed = raw | {name: dtype for name in ("torch_dtype", "dtype") if name in raw}
    if block_size is not None and raw["model_type"].startswith("a2d"):
        # It was given to `load_denoiser`: the published config.json does not say it.
        changed |= {"block_size": block_size, "attention_pattern": "block-causal"}
    if changed != raw:
        (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
    names = _names(originals)
    tied = model.config.tie_word_embeddings
    weights = {
        original_name(name, names): weight
        for name, weight in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_torch_state_dict(weights, folder)


def write_original_adapter(model, originals: Path, folder: Path) -> None:
    """A peft adapter on the names of its base's family. Raises ValueError for what cannot be said under them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    names = _names(originals)
    (config,) = model.peft_config.values()
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("layout='original': the adapter has ranks of its own for some modules; merge it first.")
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    renamed = {original_name(name, names): weight.contiguous() for name, weight in weights.items()}
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text()) | {"target_modules": sorted({_module(name) for name in renamed})}
    path.write_text(json.dumps(written, indent=2) + "\n")
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_from_original(
    model: nn.Module, originals: Path | None, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """An adapter that was trained on the names of its base's family, under transformers' names.

    Returns:
        The weights, and the modules that they adapt: none if the adapter is on transformers' names already.
    """
    names = _names(originals) if originals else {}
    ours = {original_name(name, names): name for name, _ in model.named_modules()}
    modules = {name: _module(name) for name in weights}
    if not names or not modules or not all(module in ours for module in modules.values()):
        return weights, []
    renamed = {name.replace(modules[name], ours[modules[name]], 1): weight for name, weight in weights.items()}
    return renamed, sorted({ours[module] for module in modules.values()})


def _names(originals: Path) -> dict[str, str]:
    path = originals / "config.json"
    return find_family(str(path), json.loads(path.read_text())["model_type"]).names


def _module(name: str) -> str:
    """The module that a weight of an adapter belongs to: "base_model.model.MODULE.lora_A.weight"."""
    return name.removeprefix(PREFIX).partition(".lora_")[0]
