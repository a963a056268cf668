"""Packages: `agents/` and `eval/` install inside dllm_gym, since their own names belong to other distributions."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["dllm_gym", "dllm_gym.*"]),
        "dllm_gym.agents",
        *(f"dllm_gym.agents.{name}" for name in find_packages("agents")),
        "dllm_gym.eval",
        *(f"dllm_gym.eval.{name}" for name in find_packages("eval")),
    ]
)
