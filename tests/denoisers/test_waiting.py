"""How often a decoding step makes the host wait for the device: once, when it asks which rows are through.

On a CPU nothing waits. There, a dispatch mode marks what a device would have computed, from the weights on, and counts
the operations that need its value on the host. With CUDA, torch itself counts.
"""

import contextlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from checkpoints import write_dream, write_llada, write_qwen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dllm_gym import load_denoiser
from dllm_gym.agents.samplers.decode import Prompts
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.denoisers import base, cache, session
from dllm_gym.envs import episodes as episodes_module
from dllm_gym.envs.episodes import Episodes
from dllm_gym.envs.settings import EnvSettings
from dllm_gym.types import Action

NEEDS_VALUES = {"nonzero", "unique_dim", "_unique2", "masked_select", "equal", "bincount"}
READING = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")


class Device(TorchDispatchMode):
    """Marks the tensors of an imagined device, and names what waits for them."""

    def __init__(self):
        super().__init__()
        self.marked: dict[int, object] = {}  # storages by address, kept, so that no address comes twice
        self.waits: list[str] = []

    def mark(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.marked[storage.data_ptr()] = storage
        return tensor

    def has(self, value) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self.marked

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        flat, _ = tree_flatten((args, kwargs or {}))
        name = function.overloadpacket.__name__
        if any(self.has(value) for value in flat):
            by_mask = name in ("index", "index_put", "index_put_") and any(
                isinstance(part, Tensor) and part.dtype == torch.bool for part in args[1]
            )
            if name in NEEDS_VALUES or by_mask:
                self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        if any(self.has(value) for value in flat):
            tree_map(lambda value: self.mark(value) if isinstance(value, Tensor) else value, result)
        return result


@contextlib.contextmanager
def imagined_device(module: torch.nn.Module, canvas):
    """The module's weights and the canvas on a device of their own; yields the list of what waits for it."""
    device = Device()
    for tensor in (*module.parameters(), *module.buffers(), *vars(canvas).values()):
        device.mark(tensor)

    def onto(_, *tensors):
        return tuple(device.mark(tensor.clone()) for tensor in tensors)

    def read(tensor):
        device.waits.append("read")
        return torch.from_numpy(original["numpy"](tensor).copy())

    original = {name: getattr(torch.Tensor, name) for name in READING}

    def watched(name):
        def method(tensor, *args, **kwargs):
            if device.has(tensor):
                device.waits.append(name)
            return original[name](tensor, *args, **kwargs)

        return method

    with contextlib.ExitStack() as stack:
        for name in READING:
            stack.enter_context(patch.object(torch.Tensor, name, watched(name)))
        for room in (base, cache, session, episodes_module):
            stack.enter_context(patch.object(room, "onto", onto))
        stack.enter_context(patch.object(session, "read", read))
        stack.enter_context(device)
        yield device.waits


WRITERS = {"llada": write_llada, "dream": write_dream, "sdar": write_qwen}


@pytest.mark.parametrize(
    ("kind", "cached"),
    [
        ("llada", "none"),
        ("llada", "prefix"),
        ("llada", "dual"),
        ("dream", "dual"),
        ("sdar", "prefix"),
        ("sdar", "none"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_waits_once(kind, cached, temperature, tmp_path):
    denoiser = load_denoiser(WRITERS[kind](tmp_path / kind))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 40, (n,), generator=generator) for n in (3, 7, 5)]
    settings = EnvSettings(denoiser=denoiser, gen_length=8, block_length=4, cache=cached, temperature=temperature)
    episodes = Episodes(Prompts(prompts), 3, settings)
    episodes.rngs = [np.random.default_rng(row) for row in range(3)]
    sampler = make_stepwise("threshold:threshold=0.9")
    episodes.begin([0, 1, 2], [0, 1, 2])
    steps = 0
    with imagined_device(denoiser.causal_lm, episodes.canvas) as waits:
        while episodes.active.all():
            waits.clear()
            seen = episodes.observe(check=False)
            picks, _ = sampler.choose(seen)
            before = list(waits)
            ended = episodes.commit(Action.unmasking(picks > 0))
            assert before == [] and (ended or waits == ["read"]), (before, waits)
            steps += 1
    assert steps > 2


def test_the_imagined_device_sees_who_waits():
    denoiser = load_denoiser("embedded-early")
    episodes = Episodes("sudoku", 2, EnvSettings(denoiser=denoiser, cache="none"))
    episodes.rngs = [np.random.default_rng(row) for row in range(2)]
    episodes.begin([0, 1])
    with imagined_device(denoiser.causal_lm, episodes.canvas) as waits:
        seen = episodes.observe(check=True)
        assert waits == ["__bool__"]
        for wait in (
            lambda: seen.masked.nonzero(),
            lambda: seen.confidence[seen.masked],
            lambda: bool(seen.masked.any()),
            lambda: seen.entropy.tolist(),
            lambda: seen.progress.cpu(),
        ):
            waits.clear()
            wait()
            assert waits
        waits.clear()
        UnmaskingPolicy(PolicyConfig()).seeded(0).choose(seen)
        assert waits == ["__bool__"], "whether its logits are finite"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cached", ["none", "prefix", "dual"])
def test_a_step_waits_once_on_cuda(cached, tmp_path):
    denoiser = load_denoiser(write_llada(tmp_path / "llada"), device="cuda", dtype="float32")
    prompts = [torch.arange(5, 5 + n) for n in (3, 7, 5)]
    episodes = Episodes(Prompts(prompts), 3, EnvSettings(denoiser=denoiser, gen_length=8, block_length=4, cache=cached))
    sampler = make_stepwise("confidence:k=1")
    episodes.begin([0, 1, 2], [0, 1, 2])
    for _ in range(6):
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen = episodes.observe(check=False)
            picks, _ = sampler.choose(seen)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        episodes.commit(Action.unmasking(picks > 0))
