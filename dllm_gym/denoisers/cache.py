"""Keys and values that a decoding session keeps from one forward pass to the next.

A forward pass runs over a *window* of columns of each row, and attends to the kept keys and values of all others. The
caches differ in the window:

- "prompt": the completion. The prompt is forwarded once. Exact for prompt-causal denoisers.
- "prefix" of a block-causal denoiser (SDAR, arXiv 2510.06303): all after the last finished block, up to the end of the
  active one. Exact.
- "prefix" and "dual" of others are Fast-dLLM's (arXiv 2505.22618). A row that enters a block is forwarded whole, and
  the prediction serves its first step there. Until the block is finished, later steps run from the start of the block
  to the end of the row ("prefix"), or over the block only ("dual"). What they attend to outside is as old as the
  block's first step, so both are approximations.

Columns are those of prompt and completion beside each other, T = P + L, prompts left-padded to P.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.denoisers.attention import count_positions
from dllm_gym.denoisers.base import Memory, inputs_of
from dllm_gym.transfer import onto
from dllm_gym.types import Canvas, Outline

if TYPE_CHECKING:
    from dllm_gym.denoisers.pretrained import PretrainedDenoiser


class KeyValueCache(Memory):
    """Keys and values of R rows.

    Memory: ``2 * layers * key-value heads * head size * R * (T + 1)`` numbers in the dtype of the weights, for the
    longest prompt so far. What was kept is dropped as soon as the denoiser's weights change.

    Args:
        denoiser: has the keys and values.
        cache: "prompt", "prefix" or "dual".
        num_rows: R.
        block_length: of the completion; blocks are decoded left to right.
    """

    def __init__(self, denoiser: PretrainedDenoiser, cache: str, num_rows: int, block_length: int):
        self.denoiser = denoiser
        self.cache = cache
        self.num_rows = num_rows
        self.block_length = block_length
        self.looks_ahead = cache == "prompt"
        self._shift = int(denoiser.shifted)
        """1 where column i - 1 predicts token i; windows then begin one column earlier."""
        self.positions = torch.zeros(num_rows, dtype=torch.int64)
        self._capacity = 0
        """Columns of the buffers: a spare one, which nothing reads, and then, right-aligned, those of the rows."""
        self._keys: dict[int, Tensor] = {}
        """Layer -> ``[R, heads, capacity, head size]``."""
        self._values: dict[int, Tensor] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._weights = self.denoiser.weights_version()
        self._kept = torch.full_like(self.positions, -1)
        """``[R]``: the block that a row has entered; of exact caches how many positions are kept for good; or -1."""

    def forget(self, rows: Tensor) -> None:
        super().forget(rows)
        self._kept = self._kept.index_fill(0, rows, -1)

    def encode(self, canvas: Canvas, outline: Outline, rows: Tensor, at: Tensor) -> Tensor:
        if self._weights != self.denoiser.weights_version():
            self._begin_anew()
        width, length = canvas.prompt.shape[1], canvas.tokens.shape[1]
        device = canvas.tokens.device
        self._reserve(width + length)
        start, end, entering = self._windows(canvas, outline, rows)
        row_of, column_of = at.nonzero(as_tuple=True)
        features = None
        first = width - outline.prompt_length
        for part in (entering, ~entering):
            if not part.any():
                continue
            index = part.nonzero()[:, 0]
            own = canvas if part.all() else canvas[onto(device, index)[0]]
            hidden = self._forward(own, rows[index], start[index], end[index])
            here = part[row_of].nonzero()[:, 0]
            row, column = row_of[here], width + column_of[here] - self._shift
            column = torch.maximum(column, first[row]) - (end[row] - hidden.shape[1])
            row, column, here = onto(device, (part.cumsum(dim=0) - 1)[row], column, here)
            found = hidden[row, column]
            if part.all():
                features = found
            else:
                features = hidden.new_empty(len(row_of), hidden.shape[-1]) if features is None else features
                features[here] = found
        self.positions = self.positions.index_add(0, rows, end - torch.maximum(start, first))
        assert features is not None
        return features

    def _windows(self, canvas: Canvas, outline: Outline, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First column, column after the last, and whether the row enters a block: ``[B]`` each. Notes what is kept."""
        width, length = canvas.prompt.shape[1], canvas.tokens.shape[1]
        prompt_length, offset = outline.prompt_length, self.denoiser.block_offset(outline.prompt_length)
        _, active = decoding.blocks(outline.masked, self.block_length, offset)
        block = active[:, 0]
        block_start = (active * self.block_length - offset)[:, 0]  # before the completion, where it shares a block
        block_end = width + (block_start + self.block_length).clamp(max=length)
        whole = torch.full_like(block_end, width + length)
        kept = self._kept[rows]
        if self.cache == "prompt":
            fresh = (kept < 0).nonzero()[:, 0]
            if len(fresh):
                self._forward_prompts(canvas[onto(canvas.tokens.device, fresh)[0]], outline[fresh], rows[fresh])
            self._kept = self._kept.index_copy(0, rows, prompt_length)
            return torch.full_like(block_end, width), whole, torch.zeros_like(whole, dtype=torch.bool)
        if self.denoiser.block_size:
            finished = prompt_length + block_start
            kept = torch.minimum(kept.clamp(min=0), finished)  # less, where a written token was taken back
            self._kept = self._kept.index_copy(0, rows, finished)
            return width - prompt_length + kept, block_end, kept < finished
        entering = kept != block
        self._kept = self._kept.index_copy(0, rows, block)
        start = (width + block_start - self._shift).clamp(min=0)
        end = whole if self.cache == "prefix" else block_end
        return torch.where(entering, 0, start), torch.where(entering, whole, end), entering

    def _forward(self, canvas: Canvas, rows: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Hidden states ``[B, W, H]`` of the W columns before ``end``; what is before ``start`` is not kept."""
        window = int((end - start).max())
        # A block-causal row sees nothing beyond its window.
        stop = int(end.max()) if self.denoiser.block_size else canvas.prompt.shape[1] + canvas.tokens.shape[1]
        columns = (end[:, None] - window) + torch.arange(window)
        outside = columns < start[:, None]
        columns = columns.clamp(min=0)
        tokens, real = inputs_of(canvas)
        spare = self._capacity - tokens.shape[1]
        every = len(rows) == self.num_rows
        columns, write, rows = onto(tokens.device, columns, torch.where(outside, 0, spare + columns), rows)
        position = count_positions(real)
        here = position.gather(1, columns)
        visible = self.denoiser.pattern.sees(here, position[:, :stop], canvas.prompt_length)
        pass_ = _Pass(self, None if every else rows, write, slice(spare, spare + stop))
        return self.denoiser.run(tokens.gather(1, columns), here, visible, pass_)

    def _forward_prompts(self, canvas: Canvas, outline: Outline, rows: Tensor) -> None:
        """Keep the keys and values of prompts, each of which is forwarded once, however many rows have it."""
        width = int(outline.prompt_length.max())
        if not width:
            return
        prompts = canvas.prompt.masked_fill(~canvas.prompt_mask, -1)[:, -width:]
        prompts, copies = prompts.unique(dim=0, return_inverse=True)
        position = count_positions(prompts >= 0)
        visible = self.denoiser.pattern.sees(position, position, position[:, -1] + 1)
        end = self._capacity - canvas.tokens.shape[1]
        columns = torch.arange(end - width, end, device=prompts.device).expand(len(rows), -1)
        (index,) = onto(prompts.device, rows)
        self.denoiser.run(prompts.clamp(min=0), position, visible, _Pass(self, index, columns, None, copies))
        self.positions = self.positions.index_add(0, rows, outline.prompt_length)

    def _reserve(self, columns: int) -> None:
        """Make room for so many columns. Raises ValueError where there is no memory for them."""
        if columns < self._capacity:
            return
        needed = self.denoiser.cache_bytes(self.num_rows, columns + 1)
        free = free_memory(self.denoiser.device)
        if free is not None and needed > free:
            raise ValueError(
                f"cache={self.cache!r}: the keys and values of {self.num_rows} rows of {columns} positions need "
                f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free on {self.denoiser.device}; decode "
                f"fewer rows together (num_envs), or give cache='none'."
            )
        self._capacity = columns + 1

    def buffer(self, kept: dict[int, Tensor], layer: int, like: Tensor) -> Tensor:
        """The buffer of a layer, as wide as the rows now are; ``like`` ``[B, heads, W, head size]``."""
        buffer = kept.get(layer)
        if buffer is None or buffer.shape[2] < self._capacity:
            wider = like.new_zeros(self.num_rows, like.shape[1], self._capacity, like.shape[3])
            if buffer is not None:
                wider[:, :, self._capacity - buffer.shape[2] + 1 :] = buffer[:, :, 1:]
            kept[layer] = buffer = wider
        return buffer


class _Pass:
    """What transformers takes for its cache in one forward pass.

    Args:
        cache: the buffers.
        rows: ``[B]`` int64, the rows to keep keys and values of; None: all.
        write: ``[B, W]`` int64, the buffers' columns that they are written to.
        read: the buffers' columns that are attended to; None: those of the forward pass alone.
        copies: ``[B]`` int64, which row of the forward pass each row has; None: its own.
    """

    def __init__(
        self, cache: KeyValueCache, rows: Tensor | None, write: Tensor, read: slice | None, copies: Tensor | None = None
    ):
        self.cache, self.rows, self.write, self.read, self.copies = cache, rows, write, read, copies
        self.layers = 0

    @torch.compiler.disable  # every layer has buffers of its own, and would be compiled for itself
    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Keep ``[B, heads, W, head size]``, and return what is attended to. The layers call it in their order."""
        layer = self.layers = self.layers + 1
        return self._keep(self.cache._keys, key, layer), self._keep(self.cache._values, value, layer)

    def _keep(self, kept: dict[int, Tensor], new: Tensor, layer: int) -> Tensor:
        buffer = self.cache.buffer(kept, layer, new)
        write = self.write.to(new.device)
        rows = torch.arange(len(write), device=new.device) if self.rows is None else self.rows.to(new.device)
        own = new if self.copies is None else new[self.copies.to(new.device)]
        buffer[rows[:, None], :, write] = own.transpose(1, 2)
        if self.read is None:
            return new
        attended = buffer[:, :, self.read]
        return attended if self.rows is None else attended.index_select(0, rows)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that is not known."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.is_file():
        return None
    fields = dict(line.split(":") for line in known.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
