"""Published decoding settings by name, with the scores that were published for them.

``dllm-eval --preset NAME`` evaluates one. ``python -m dllm_gym.eval.presets`` prints them all as a Markdown table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_gym.names import find

FILE = Path(__file__).with_name("presets.yaml")


@dataclass(frozen=True)
class Preset:
    """A row of a published table."""

    name: str
    env: dict[str, Any]
    """What differs from the defaults of `EnvConfig`."""
    sampler: str
    published: dict[str, float]
    """Score in percent, by who measured it."""
    source: str
    differs: str
    """What the published evaluation did otherwise."""

    @property
    def scores(self) -> str:
        """The published scores as text."""
        return ", ".join(f"{score:.1f} ({who})" for who, score in self.published.items())


def presets() -> dict[str, Preset]:
    """All of them, by name."""
    import yaml

    return {name: Preset(name, **content) for name, content in yaml.safe_load(FILE.read_text()).items()}


def load_preset(name: str) -> Preset:
    """One of them. Raises ValueError, which names the nearest, where there is no such preset."""
    known = presets()
    return known[find(name, known, "preset")]


def table() -> str:
    """All of them as a Markdown table."""
    columns = ("`--preset`", "length", "block", "sampler", "shots", "further", "published", "source", "there otherwise")
    rows = [columns, ("---",) * len(columns)]
    for preset in presets().values():
        env = {name: value for name, value in preset.env.items() if name not in ("id", "denoiser")}
        length, shots = env.pop("gen_length"), env.pop("few_shot", 0)
        block = env.pop("block_length", length)
        shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in env.items()}
        further = ", ".join(key if value is True else f"{key} {value}" for key, value in shown.items())
        name, scores = f"`{preset.name}`", preset.scores
        rows.append((name, length, block, preset.sampler, shots, further, scores, preset.source, preset.differs))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


if __name__ == "__main__":
    print(table())
