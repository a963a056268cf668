"""Share what a run has trained: ``train_policy.py push RUN owner/name``.

The folder of the policy or of the denoiser goes to the Hugging Face hub, with a model card that says what it is, how it
was trained and what it reached. `load_policy("owner/name")` and `load_denoiser("owner/name")` read it back.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import dllm_gym
from dllm_gym.agents.cli import ALGORITHMS, flag
from dllm_gym.agents.trainers.configs import read_config
from dllm_gym.extras import needs
from dllm_gym.hub import is_hub_id

with needs("train"):
    import tyro

PARTS = ("policy", "denoiser")


@dataclass
class PushConfig:
    """Put what a run has trained on the Hugging Face hub."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""
    repo: Annotated[str, tyro.conf.Positional]
    """Where to: "owner/name". It is made if there is none."""
    part: str | None = None
    """"policy" or "denoiser"; None takes the one that the run has."""
    private: bool = False
    """Make a new repository private."""


def push(config: PushConfig) -> str:
    """Upload, and return the address.

    Raises:
        ValueError: no finished run, no such part of it, no "owner/name", or no token.
        OSError: the hub does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    folder = Path(config.run)
    record = read_config(folder)
    part = _part(folder, config.part)
    if not is_hub_id(config.repo):
        raise ValueError(f"repo={config.repo!r}: must be of the form 'owner/name'.")
    if get_token() is None:
        raise ValueError("no token for the hub: log in with `hf auth login`, or set HF_TOKEN.")
    files = [path for path in sorted((folder / part).rglob("*")) if path.is_file()]
    operations = [CommitOperationAdd(str(path.relative_to(folder / part)), str(path)) for path in files]
    text = card(folder, record, part, config.repo)
    operations.append(CommitOperationAdd("README.md", text.encode()))
    api = HfApi()
    try:
        address = api.create_repo(config.repo, private=config.private, exist_ok=True)
        api.create_commit(config.repo, operations, commit_message=f"{part} trained by {record['algorithm']}")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OSError(f"{config.repo}: the hub did not take it ({type(error).__name__}: {reason}).") from error
    print(f"pushed {part} to {address}")
    return str(address)


def _part(folder: Path, wanted: str | None) -> str:
    there = [part for part in PARTS if (folder / part).is_dir()]
    if wanted is not None and wanted not in PARTS:
        raise ValueError(f"part={wanted!r}: must be 'policy' or 'denoiser'.")
    if wanted is not None and wanted not in there:
        raise ValueError(f"part={wanted!r}: run {str(folder)!r} has {' and '.join(there) or 'nothing trained yet'}.")
    if not there:
        raise ValueError(f"run={str(folder)!r}: nothing is trained yet; it has neither policy nor denoiser.")
    if wanted is None and len(there) > 1:
        raise ValueError(f"run={str(folder)!r}: has policy and denoiser; say which with --part.")
    return wanted or there[0]


def card(folder: Path, record: dict[str, Any], part: str, repo: str) -> str:
    """The model card: what it is, how to use it, how it was trained, and the comparison at the end of training."""
    algorithm, env = record["algorithm"], record.get("env")  # supervised training has no environment
    base = (env or {}).get("denoiser") or "embedded"
    where = f" on `{env['id']}`, denoiser `{base}`," if env else ""
    load = f'load_policy("{repo}")' if part == "policy" else f'load_denoiser("{repo}")'
    module = "dllm_gym.agents" if part == "policy" else "dllm_gym"
    what = "An unmasking policy" if part == "policy" else "A masked diffusion language model"
    lines = [
        "---",
        "library_name: dllm-gym",
        "tags: [masked-diffusion, reinforcement-learning]",
        *([f"base_model: {base}"] if is_hub_id(base) else []),
        "---",
        "",
        f"# {repo.partition('/')[2]}",
        "",
        f"{what} trained with `{algorithm}`{where} by dllm-gym {dllm_gym.__version__}.",
        "",
        "```python",
        f"from {module} import {load.partition('(')[0]}",
        "",
        f"{part} = {load}",
        "```",
        "",
        "Trained with",
        "",
        f"    {command(record)}",
        "",
        *results(folder),
    ]
    return "\n".join(lines)


def command(record: dict[str, Any]) -> str:
    """The command that trains a run: the flags that differ from their defaults."""
    module, name = ALGORITHMS[record["algorithm"]]
    config_type = getattr(import_module(module), name)
    chosen = {"objective": record["objective"]} if "objective" in record else {}
    default = json.loads(json.dumps(dataclasses.asdict(config_type(**chosen))))
    flags = [f"--objective {record['objective']}"] if chosen else []
    return " ".join(["train_policy.py", record["algorithm"], *flags, *_flags(record, default)])


def _flags(settings: dict[str, Any], default: dict[str, Any], prefix: str = "") -> list[str]:
    flags = []
    for name, value in settings.items():
        if name not in default or value == default[name]:
            continue
        option = name.replace("_", "-")
        if isinstance(value, dict):
            flags += _flags(value, default[name], f"{prefix}{option}.")
        else:
            flags.append(" ".join(flag(prefix + option, value)))
    return flags


def results(folder: Path) -> list[str]:
    """The comparison at the end of training as a Markdown table; nothing where there was none."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else {}
    if "rows" not in summary:
        return []
    rows: dict[str, dict] = {}
    for label, row in summary["rows"].items():
        rows |= {label: row} if "accuracy" in row else {f"{label}, {name}": one for name, one in row.items()}
    lines = [
        f"On {summary['problems']} held-out problems, with 95 % intervals over problems:",
        "",
        "| | accuracy % | denoiser forwards | reward |",
        "| --- | --- | --- | --- |",
    ]
    for label, row in rows.items():
        low, high = (100 * bound for bound in row["accuracy_interval"])
        accuracy = f"{100 * row['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
        lines.append(f"| {label} | {accuracy} | {row['nfe']:.1f} | {row['reward']:.3f} |")
    return [*lines, ""]
