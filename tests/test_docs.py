"""The documentation says what the code says."""

import dataclasses
import re
from pathlib import Path

import gymnasium as gym
import pytest

import dllm_gym  # noqa: F401
from dllm_gym.agents.cli import ALGORITHMS
from dllm_gym.agents.samplers.heuristics import HEURISTICS
from dllm_gym.agents.samplers.spec import SAMPLERS
from dllm_gym.envs.__main__ import page
from dllm_gym.eval.presets import presets, table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_environments_page_is_their_docstrings():
    """Made by ``python -m dllm_gym.envs > docs/environment.md``."""
    assert (ROOT / "docs/environment.md").read_text() == f"{page()}\n"


def test_the_table_of_presets_is_their_file():
    """Made by ``python -m dllm_gym.eval.presets``."""
    assert (ROOT / "docs/published-settings.md").read_text().endswith(f"\n\n{table()}\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def test_ids_algorithms_and_samplers_named_in_the_documentation_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    registered_there = re.findall(r'gym\.register\(\s*"([\w-]+)"', text)
    assert set(re.findall(r"MaskedDiffusion-\w+(?:-\w+)?-v0", text)) <= gym.registry.keys() | set(registered_there)
    assert set(re.findall(r"train_policy\.py ([a-z][\w-]*)", text)) <= {*ALGORITHMS, "push"}
    assert set(re.findall(r"--sampler ([a-z-]+):", text)) <= SAMPLERS.keys()
    assert set(re.findall(r"--preset ([a-z][\w.-]*)", text)) <= presets().keys()


def test_every_heuristic_is_documented():
    page = (ROOT / "docs/samplers.md").read_text().partition("## Independent Metropolis-Hastings")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page[0], re.M)) == set(HEURISTICS)
    arguments = {field.name for field in dataclasses.fields(SAMPLERS["metropolis"])} - {"seed"}
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page[2], re.M)) == arguments
