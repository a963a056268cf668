"""Fixtures that several test files share."""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # two workers share two cores, and so do the processes that tests start

import pytest
import torch
from scripted import ScriptedDenoiser, ScriptedTask

from dllm_gym import load_denoiser
from dllm_gym.denoisers.base import Denoiser

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handler of Ctrl-C, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@pytest.fixture
def scripted() -> ScriptedDenoiser:
    """Four positions that say "a b c d" with confidence 0.9, 0.6, 0.8 and 0.7, the rest on "<eos>"."""
    return ScriptedDenoiser(
        [
            [0.9, 0.0, 0.0, 0.0, 0.1],
            [0.0, 0.6, 0.0, 0.0, 0.4],
            [0.0, 0.0, 0.8, 0.0, 0.2],
            [0.0, 0.0, 0.0, 0.7, 0.3],
        ]
    )


@pytest.fixture
def task() -> ScriptedTask:
    """Three problems of four words; the scripted denoiser answers the first rightly."""
    return ScriptedTask()


@pytest.fixture(scope="session")
def embedded() -> Denoiser:
    """The embedded denoiser, loaded once."""
    return load_denoiser("embedded")
