"""Loading a denoiser: by name, from a folder, or from a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dllm_gym.denoisers import checkpoints, layouts
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.denoisers.families import find_family
from dllm_gym.denoisers.oracle import OracleDenoiser
from dllm_gym.denoisers.pretrained import PretrainedDenoiser
from dllm_gym.extras import needs

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


def load_denoiser(
    name_or_path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    attention: str = "auto",
    device_map: str | dict | None = None,
    block_size: int | None = None,
    quantization: str | None = None,
    compile: str | None = None,
) -> Denoiser:
    """A denoiser by name, folder or hub id. Nothing that a checkpoint brings is run, and no pickle is read.

    Args:
        name_or_path: "embedded", "embedded-early" or "oracle"; a folder; or a hub id ("GSAI-ML/LLaDA-8B-Instruct",
            "Dream-org/Dream-v0-Instruct-7B", "JetLM/SDAR-1.7B-Chat"), which is downloaded once. A folder may hold LLaDA
            (model_type "llada"), Dream ("Dream"), SDAR or TraDo ("sdar"), or A2D models ("a2d-qwen3", "a2d-qwen2",
            "a2d-llama") as published, in one or several safetensors files; what `train_policy.py sft` or
            `PretrainedDenoiser.save` wrote; or a peft adapter (adapter_config.json): it is loaded frozen on its base.
        device: "auto" (CUDA where there is one), or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float32 on the CPU), "bfloat16", "float16", "float32" ("bf16", "fp16",
            "fp32"), or a torch dtype.
        attention: "auto" ("sdpa" on CUDA; "eager" on a CPU, where it is faster for short sequences), "sdpa", "eager" or
            "flash_attention_2".
        device_map: handed to transformers' `from_pretrained` ("auto", or modules and their devices), to spread a model
            over several GPUs; instead of `device`, which is then the embedding's.
        block_size: number of positions per block of a block-causal checkpoint, SDAR or an A2D model trained with
            BD3-LM's objective. None: what config.json says, or 4 for SDAR; an A2D model is then bidirectional.
        quantization: "nf4": the matrices of the layers in 4 bits (bitsandbytes), to train adapters on; `dtype` is what
            they compute in. None: as they are.
        compile: the layers are compiled by this backend of torch.compile, "inductor" for example; each new kind of call
            then takes seconds once. None: they are not.

    Raises:
        FileNotFoundError: neither a known name, nor a checkpoint folder, nor to be had from the hub.
        ValueError: a checkpoint of another kind, incomplete, or with missing, unused or misshapen weights; a config
            that the transformers class cannot express; no mask or end token; an argument not among the above; compiled
            layers where there are none.
        ImportError: an adapter without peft, or quantization without bitsandbytes.
    """
    _require_backend(compile)
    if str(name_or_path) == "oracle":
        if compile is not None:
            raise ValueError(f"compile={compile!r}: the oracle is a table, without layers; leave it out.")
        return OracleDenoiser.default("cpu" if device == "auto" else device)
    given = f"denoiser={str(name_or_path)!r}"
    known = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not (known == "auto" or (isinstance(known, torch.dtype) and known.is_floating_point)):
        raise ValueError(f"dtype={dtype!r}: must be 'auto', a floating torch dtype, or one of {sorted(DTYPES)}.")
    dtype = known
    if device_map is not None and device != "auto":
        raise ValueError(f"device={str(device)!r}: leave it out if device_map is given, which says the devices.")
    try:
        torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        raise ValueError(f"device={str(device)!r}: must be 'auto', 'cpu', 'cuda', or one as torch names it.") from None
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA device; give 'auto' or 'cpu'.")
    _require_attention(attention)
    quantized = _quantization(quantization, dtype)
    folder, source = checkpoints.find_folder(given, name_or_path)
    if not (folder / "config.json").is_file():
        options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "attention": attention,
            "quantization": quantization,
            "compile": compile,
        }
        return _load_adapter(given, folder, **options, device_map=device_map, block_size=block_size)
    if device_map is None:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        device_map = {"": device}  # read straight to where it belongs
    if dtype == "auto":
        on_cuda = device.type == "cuda" if isinstance(device, torch.device) else torch.cuda.is_available()
        dtype = torch.bfloat16 if on_cuda else torch.float32
    if attention == "auto":
        attention = "eager" if isinstance(device, torch.device) and device.type == "cpu" else "sdpa"

    raw = checkpoints.read_json(given, folder / "config.json")
    family = find_family(given, raw.get("model_type"))
    model_class, config = checkpoints.read_config(given, folder, raw, family)
    tokenizer = checkpoints.read_tokenizer(given, folder)
    checkpoints.set_tokens(given, config, raw, family, tokenizer, block_size)
    if attention == "flash_attention_2" and config.attention_pattern != "bidirectional":
        raise ValueError(
            f"attention={attention!r}: it cannot be {config.attention_pattern}, as {given} is; give 'sdpa'."
        )
    weights = checkpoints.read_weights(given, folder, model_class, config, family.names)
    with checkpoints.quiet():
        model = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attention,
            **quantized(dtype),
        )
    model.name_or_path = source  # peft writes it into adapters
    denoiser = PretrainedDenoiser(model, tokenizer)
    denoiser.originals = layouts.originals_of(folder, family)
    denoiser.quantization = quantization
    if compile is not None:
        denoiser.compile(compile)
    return denoiser


def _load_adapter(given: str, folder: Path, **options) -> PretrainedDenoiser:
    """The base that an adapter folder names, with the adapter on it."""
    try:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError:
        raise ImportError(f"{given}: an adapter needs peft: pip install peft.") from None

    raw = checkpoints.read_json(given, folder / checkpoints.ADAPTER)
    base = raw.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{given}: {checkpoints.ADAPTER} has no base_model_name_or_path.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{given}: no adapter_model.safetensors; pickled .bin weights are never read.")
    try:
        denoiser = load_denoiser(base, **options)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{given}: the adapter's base cannot be loaded: {error}") from error
    if not isinstance(denoiser, PretrainedDenoiser) or denoiser.model is not denoiser.causal_lm:
        raise ValueError(f"{given}: the adapter's base {base!r} is an adapter itself; merge the two first.")
    with checkpoints.reading(given, "the adapter"):
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ValueError(f"{given}: peft_type={raw['peft_type']!r} writes into the prompt; LoRA can be read.")
        config.inference_mode = True
        weights = checkpoints.read_safetensors(folder / "adapter_model.safetensors")
        weights, modules = layouts.adapter_from_original(denoiser.model, denoiser.originals, weights)
        if modules:
            config.target_modules = modules
        model = get_peft_model(denoiser.model, config)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        checkpoints.require_fit(given, checkpoints.ADAPTER, expected, weights)
        set_peft_model_state_dict(model, weights)
    denoiser.model = model.eval().requires_grad_(False)
    denoiser.name = given
    if any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        denoiser.tokenizer = checkpoints.read_tokenizer(given, folder)
    return denoiser


def _quantization(name: str | None, dtype: Any) -> Callable[[Any], dict[str, Any]]:
    """Arguments of `from_pretrained`, given the dtype that is computed in. Raises ValueError for an unknown name."""
    if name is None:
        return lambda dtype: {}
    if name != "nf4":
        raise ValueError(f"quantization={name!r}: must be None or 'nf4'.")
    if dtype == torch.float16:
        raise ValueError("quantization='nf4' with float16: its range is too narrow; give bfloat16 or float32.")
    with needs("quantization"):
        import bitsandbytes  # noqa: F401
    from transformers import BitsAndBytesConfig

    return lambda dtype: {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    }


def _require_backend(backend: str | None) -> None:
    if backend is None:
        return
    from torch._dynamo import list_backends

    if backend not in (known := ["eager", "aot_eager", *list_backends()]):
        raise ValueError(f"compile={backend!r}: must be None, or one of {', '.join(known)}.")


def _require_attention(attention: str) -> None:
    if attention not in ATTENTION:
        raise ValueError(f"attention={attention!r}: must be one of {list(ATTENTION)}.")
    if attention == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise ValueError(
                "attention='flash_attention_2': flash-attn is not installed, or there is no CUDA device; "
                "install it, or take 'sdpa'."
            )
