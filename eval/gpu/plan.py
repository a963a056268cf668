"""How much memory decoding and training take, calculated from the shape of a denoiser before anything is loaded.

`tests/eval/test_plan.py` compares weights, adapters, float32 weights, Adam's states, activations and cache with what
torch really keeps, for small denoisers; DDP's buckets, gathered layers and logits are calculated only. What is not
counted: the CUDA context (about half a GB), the allocator's fragmentation, and kernels' workspaces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dllm_gym.denoisers import checkpoints
from dllm_gym.denoisers.base import CHUNK
from dllm_gym.denoisers.families import find_family
from dllm_gym.hub import download, is_hub_id

FLOAT32 = 4
GB = 1e9
LOGIT_TENSORS = 5
"""Tensors as large as a chunk of logits that stand at the same time: logits, probabilities, and what they come from."""


@dataclass(frozen=True)
class Shape:
    """What memory depends on."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @staticmethod
    def of(config) -> Shape:
        """Of a transformers config of Llama, Qwen2 or Qwen3."""
        heads = config.num_attention_heads
        return Shape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            qkv_bias=config.model_type == "qwen2",
            qk_norm=config.model_type == "qwen3",
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden),
            (self.hidden, self.mlp), (self.hidden, self.mlp), (self.mlp, self.hidden),
        ]  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Number of weights in a layer."""
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim * self.qkv_bias
        return sum(rows * columns for rows, columns in self.matrices) + norms + biases

    @property
    def weights(self) -> int:
        """Number of weights."""
        ends = self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_weights + ends

    def adapter_weights(self, rank: int) -> int:
        """Number of weights of adapters on all matrices of the layers."""
        return self.layers * rank * sum(rows + columns for rows, columns in self.matrices)


SHAPES = {
    "llada-8b": Shape(32, 4096, 12288, 32, 32, 128, 126464),
    "dream-7b": Shape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),
}
"""Published shapes by name."""


@dataclass(frozen=True)
class Setting:
    """How is decoded and trained; for one process."""

    rows: int = 32
    """Completions decoded together."""
    prompt_length: int = 256
    gen_length: int = 256
    microbatch: int = 2
    """Completions a backward pass."""
    maskings: int = 2
    rank: int = 0
    """Of adapters; 0 trains all weights."""
    checkpointing: bool = False
    shard: bool = False
    cache: str = "none"
    half: bool = True
    """Whether weights are bfloat16."""
    reference: bool = False
    """Whether a frozen copy is kept: of an objective with a reference, without adapters."""


def plan(shape: Shape, setting: Setting, processes: int = 1) -> dict[str, float]:
    """Bytes in each process: the parts, and the most that stands at one time ("peak")."""
    width = 2 if setting.half else FLOAT32
    tokens = setting.prompt_length + setting.gen_length
    parts: dict[str, float] = {"weights": shape.weights * width}
    trained = shape.adapter_weights(setting.rank) if setting.rank else shape.weights
    share = processes if setting.shard else 1
    if setting.rank:
        parts["adapters"] = trained * FLOAT32
        if setting.shard:  # a second copy of weights and adapters, sharded
            parts["adapters"] += (shape.weights * width + trained * FLOAT32) / share
    elif setting.shard or setting.half:
        parts["float32 weights"] = trained * FLOAT32 / share
    gradient = width if setting.half and not (setting.rank or setting.shard) else FLOAT32
    parts["gradients"] = trained * gradient / share
    if processes > 1 and not setting.shard:
        parts["gradient buckets"] = trained * gradient  # of DDP's all-reduce
    parts["Adam"] = 2 * trained * FLOAT32 / share
    if setting.reference and not setting.rank:
        parts["reference"] = shape.weights * width
    if setting.shard:  # a layer, and the next one, which is gathered meanwhile; embedding and head
        parts["gathered"] = (2 * shape.layer_weights + (shape.weights - shape.layers * shape.layer_weights)) * width
    parts["activations"] = activations(shape, setting)
    parts["logits"] = LOGIT_TENSORS * CHUNK * FLOAT32
    cache = 0 if setting.cache == "none" else 2 * shape.layers * shape.kv_heads * shape.head_dim * (tokens + 1) * width
    parts["cache"] = setting.rows * cache
    during_backward = parts["activations"] + parts.get("gathered", 0) + parts["gradients"]
    during_step = trained * FLOAT32 / share  # gradients in the optimiser's dtype
    standing = sum(parts.values()) - during_backward - parts["cache"]
    parts["peak"] = standing + max(during_backward, during_step, parts["cache"])
    return parts


def activations(shape: Shape, setting: Setting) -> float:
    """Bytes that one forward pass keeps for its backward pass, with torch's fused attention (sdpa) and padded rows."""
    width = 2 if setting.half else FLOAT32
    length = setting.prompt_length + setting.gen_length
    tokens = setting.microbatch * setting.maskings * length
    layer = tokens * _layer(shape, setting, width, length)
    last_norm = tokens * (FLOAT32 + width) * shape.hidden
    if setting.checkpointing:  # the input of every layer, and all of the one that is recomputed
        return tokens * shape.layers * shape.hidden * width + layer + last_norm
    return shape.layers * layer + last_norm


def _layer(shape: Shape, setting: Setting, width: int, length: int) -> float:
    """Bytes a token in a layer."""
    hidden, mlp, queries = shape.hidden, shape.mlp, shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    attention = 4 * queries if setting.rank and setting.half else queries + 2 * keys
    small = FLOAT32 * shape.heads + 2 * FLOAT32 + width * length  # normalisers of attention and norms, and the mask
    if shape.qk_norm:
        small += (queries + keys) * (FLOAT32 + width) + FLOAT32 * (shape.heads + shape.kv_heads)
    if not setting.rank:
        return width * (5 * hidden + attention + 4 * mlp) + 2 * FLOAT32 * hidden + small
    small += len(shape.matrices) * setting.rank * FLOAT32
    if not setting.half:
        return FLOAT32 * (5 * hidden + attention + 4 * mlp) + small
    # Adapters read float32 copies of what their matrices read.
    return FLOAT32 * (8 * hidden + mlp) + width * (3 * mlp + attention) + small


def shape_of(name: str) -> Shape:
    """The shape of "llada-8b", "dream-7b", or of a checkpoint whose config.json alone is read.

    Raises:
        FileNotFoundError: no such checkpoint. ValueError: one of an unknown kind.
    """
    if name in SHAPES:
        return SHAPES[name]
    given, folder = f"plan={name!r}", Path(name)
    if not folder.is_dir():
        if not is_hub_id(name):
            raise FileNotFoundError(f"{given}: must be one of {sorted(SHAPES)}, a folder with config.json or a hub id.")
        folder = download(given, name, ["config.json"])
    raw = checkpoints.read_json(given, folder / "config.json")
    return Shape.of(checkpoints.read_config(given, folder, raw, find_family(given, raw.get("model_type")))[1])


def advice(shape: Shape, setting: Setting, processes: int, memory: float) -> str:
    """Which flags make a setting fit into so many bytes, the cheapest first."""
    changes: dict[str, dict] = {
        "--gradient-checkpointing": {"checkpointing": True},
        "--microbatch 1": {"microbatch": 1},
        "--env.num-envs 8": {"rows": min(setting.rows, 8)},
        **({"--shard": {"shard": True}} if processes > 1 else {}),
        "--lora.rank 128": {"rank": 128, "shard": False},  # whose states are small: sharding gains nothing then
    }

    def fits(flags: list[str]) -> bool:
        changed = replace(setting, **{name: value for flag in flags for name, value in changes[flag].items()})
        return plan(shape, changed, processes)["peak"] <= memory

    if fits([]):
        return "fits"
    flags: list[str] = []
    for flag in changes:
        flags = [other for other in flags if (other, flag) != ("--shard", "--lora.rank 128")] + [flag]
        if fits(flags):
            needed = [flag for flag in flags if not fits([other for other in flags if other != flag])]
            return "fits with " + " ".join(needed or flags)
    return "does not fit, whatever the flags; take more memory, or a smaller denoiser"


def print_plan(name: str, setting: Setting, processes: int, memory_gb: float) -> None:
    """The table for one process, for several with the same weights each, and for several that shard them."""
    from rich.table import Table

    from dllm_gym.agents.terminal import console

    shape = shape_of(name)
    columns = {"1 GPU": (replace(setting, shard=False), 1)}
    if processes > 1:
        columns[f"{processes} GPUs"] = (replace(setting, shard=False), processes)
        columns[f"{processes} GPUs, --shard"] = (replace(setting, shard=True), processes)
    plans = {title: plan(shape, *column) for title, column in columns.items()}
    kind = f"adapters of rank {setting.rank}" if setting.rank else "all weights"
    table = Table(
        title=f"{name}: {shape.weights / 1e9:.2f} B weights, {'bfloat16' if setting.half else 'float32'}, {kind}; "
        f"{setting.rows} rows decoded, {setting.microbatch} x {setting.maskings} maskings a backward pass, "
        f"{setting.prompt_length} + {setting.gen_length} tokens",
        caption="GB (10^9 bytes) in each process; calculated",
    )
    table.add_column("what")
    for title in plans:
        table.add_column(title, justify="right")
    rows = list(dict.fromkeys(part for parts in plans.values() for part in parts if part != "peak"))
    for row in [*rows, "peak"]:
        table.add_row(row, *(f"{parts[row] / GB:.2f}" if row in parts else "" for parts in plans.values()))
    fits = (advice(shape, *column, memory_gb * GB) for column in columns.values())
    table.add_row(f"in {memory_gb:g} GB", *fits)
    console().print(table)
