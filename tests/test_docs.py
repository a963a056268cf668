"""The documentation says what the code says."""

import inspect
import re
from pathlib import Path

import gymnasium as gym
import pytest

import dllm_gym  # noqa: F401
from dllm_gym.agents.cli import ALGORITHMS
from dllm_gym.agents.heuristics import HEURISTICS
from dllm_gym.envs.unmasking import UnmaskingEnv

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_environments_page_is_its_docstring():
    """Made by ``python -m dllm_gym.envs.unmasking > docs/environment.md``."""
    assert (ROOT / "docs/environment.md").read_text() == f"# The environment\n\n{inspect.getdoc(UnmaskingEnv)}\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def test_ids_algorithms_and_samplers_named_in_the_documentation_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"MaskedDiffusion-\w+(?:-\w+)?-v0", text)) <= gym.registry.keys()
    assert set(re.findall(r"train_policy\.py ([a-z][\w-]*)", text)) <= ALGORITHMS.keys()
    assert set(re.findall(r"--sampler ([a-z-]+):", text)) <= HEURISTICS.keys()


def test_every_heuristic_is_documented():
    assert set(re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs/samplers.md").read_text(), re.M)) == set(HEURISTICS)
