"""The docstrings of the environments as one page: ``python -m dllm_gym.envs > docs/environment.md``."""

import inspect

from dllm_gym.envs.settings import settings_table
from dllm_gym.envs.unmasking import UnmaskingEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.envs.wrappers import FlatObservation, FormVectorEnv, Position, Threshold, TopK

SECTIONS = {
    "Many rows: `gym.make_vec(id, num_envs=...)`": UnmaskingVectorEnv,
    "`...-TopK-v0`": TopK,
    "`...-Threshold-v0`": Threshold,
    "`...-Position-v0`": Position,
    "The observation of these three": FlatObservation,
    "Many rows of these three": FormVectorEnv,
}


def page() -> str:
    """Markdown; what is not written as a page is quoted as it stands."""
    sections = [f"## {title}\n\n```text\n{inspect.getdoc(kind)}\n```" for title, kind in SECTIONS.items()]
    whole = (inspect.getdoc(UnmaskingEnv) or "").replace("\n\nRaises:", f"\n\n{settings_table()}\n\nRaises:")
    return "\n\n".join([f"# The environment\n\n{whole}", *sections])


if __name__ == "__main__":
    print(page())
