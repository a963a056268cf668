"""What a report shows, as plain data: `payload` turns results and run folders into what the page embeds as JSON.

The plot files are drawn from the same data, so that page and files cannot disagree.
"""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np

import dllm_gym
from dllm_gym.agents.evaluation import bootstrap_interval, describe_undecided
from dllm_gym.agents.trainers.configs import read_config
from dllm_gym.eval.metrics import pass_at_k, summary
from dllm_gym.eval.results import Cell, read_results
from dllm_gym.eval.tables import flat_settings

COMPARABLE = ("env.id", "env.dataset", "split", "env.denoiser", "env.gen_length", "env.block_length")
"""Cells that agree in these stand in one plot."""
CURVE_POINTS = 400
"""A longer training curve is averaged down to so many points."""


def payload(paths: list[Path], completions: int) -> dict:
    """Everything on the page, JSON types only.

    Args:
        paths: files of results and folders of runs.
        completions: at most so many are listed, the same problems of every cell; all count in the tables.

    Raises:
        ValueError: a path is neither, or holds nothing yet.
    """
    folders = [path for path in paths if path.is_dir()]
    files = [path for path in paths if not path.is_dir()]
    curves = _curves(folders)
    cells = _read(files)
    flat = [flat_settings(cell) for cell in cells]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    told = [name for name in names if name != "sampler"]
    columns = [name for name in told if len({_text(settings.get(name)) for settings in flat}) > 1]
    rows, families, groups = _rows(cells, flat, columns)
    prompts: dict[tuple[str, str], int] = {}
    listed, total = _completions(cells, prompts, completions)
    films = [_film(film, index, prompts) for index, cell in enumerate(cells) for film in cell.films]
    data = {
        "title": _title(flat, folders),
        "subtitle": _subtitle(flat, paths),
        "version": dllm_gym.__version__,
        "shared": [[_name(name), _text(flat[0].get(name))] for name in told if name not in columns] if flat else [],
        "columns": [_name(name) for name in columns],
        "families": [_family(policy) for policy in families],
        "groups": _group_titles(groups),
        "cells": rows,
        "films": films,
        "prompts": [list(key) for key in prompts],
        "completions": listed,
        "completions_total": total,
        "curves": curves,
    }
    return _finite(data)


def _read(files: list[Path]) -> list[Cell]:
    """The cells of all files; of one that stands in several, the version with the most problems."""
    cells: dict[str, Cell] = {}
    for path in files:
        for cell in read_results(path):
            if cell.problems and (cell.key not in cells or len(cells[cell.key].problems) < len(cell.problems)):
                cells[cell.key] = cell
    if files and not cells:
        raise ValueError(
            f"results={', '.join(map(str, files))}: no problem in it yet; give a file that dllm-eval wrote."
        )
    return list(cells.values())


def _rows(cells: list[Cell], flat: list[dict], columns: list[str]) -> tuple[list[dict], list[str], list[tuple]]:
    """What the page knows of each cell; the policies in it, by place; and the values of COMPARABLE in it, by place."""
    samplers = _short([settings["sampler"] for settings in flat])
    shorts = [samplers[settings["sampler"]] for settings in flat]
    keys = [tuple(settings.get(name) for name in COMPARABLE) for settings in flat]
    policies = list(dict.fromkeys(cell.settings["policy"] for cell in cells))
    groups = list(dict.fromkeys(keys))
    rows = []
    for cell, settings, short, key in zip(cells, flat, shorts, keys, strict=True):
        namesakes = [i for i, other in enumerate(shorts) if other == short]
        rivals = [flat[i] for i in namesakes if keys[i] == key]
        expected, figures = cell.settings["problems"], summary(cell)
        row = {
            "sampler": settings["sampler"],
            "short": short,
            "label": _with(short, settings, _apart(rivals, columns)),
            "name": _with(short, settings, _apart([flat[i] for i in namesakes], columns)),
            "family": policies.index(cell.settings["policy"]),
            "learned": cell.settings["policy"] == "UnmaskingPolicy",
            "group": groups.index(key),
            "values": [_text(settings.get(name)) for name in columns],
            "block_length": settings.get("env.block_length"),
            "partial": f"{len(cell.problems)} of {expected} problems" if len(cell.problems) < expected else None,
            "undecided": describe_undecided(figures["undecided"]),
            "summary": figures,
            "passes": _passes(cell, list(figures["pass_at_k"])),
            "chain": (cell.end or {}).get("chain"),
        }
        rows.append(row)
    for group in range(len(groups)):
        _mark_front([row for row in rows if row["group"] == group])
    return rows, policies, groups


def _name(setting: str) -> str:
    setting = {"env.id": "task"}.get(setting, setting)
    return setting.removeprefix("env.").replace("_", " ")


def _text(value) -> str:
    return "none" if value is None else str(value).removeprefix("MaskedDiffusion-").removesuffix("-v0")


def _family(policy: str) -> str:
    """ "LeftToRight" -> "left to right"."""
    return "learned" if policy == "UnmaskingPolicy" else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", policy).lower()


def _short(samplers: list[str]) -> dict[str, str]:
    """ "threshold:threshold=0.9" -> "threshold 0.9", a folder -> its name; the whole text where that is not unique."""
    short = {}
    for text in dict.fromkeys(samplers):
        name, _, arguments = text.partition(":")
        parts = arguments.split(",") if arguments and "/" not in text else []
        if len(parts) == 1:
            parts = [parts[0].partition("=")[2]]
        short[text] = " ".join([name, *parts]) if "/" not in text else Path(text).name
    seen = list(short.values())
    return {text: label if seen.count(label) == 1 else text for text, label in short.items()}


def _apart(settings: list[dict], names: list[str]) -> list[str]:
    """As few of the names, the first ones, as tell the settings apart."""
    chosen, different = [], 1
    for name in sorted(names, key=lambda name: name != "env.id"):
        told = len({tuple(_text(s.get(n)) for n in [*chosen, name]) for s in settings})
        if told > different:
            chosen, different = [*chosen, name], told
    return chosen


def _with(label: str, settings: dict, names: list[str]) -> str:
    """A label with the settings that set it apart; what is not a word carries its name."""
    parts = [label]
    for name in names:
        text = _text(settings.get(name))
        parts.append(text if name in ("env.id", "env.denoiser", "split") else f"{_name(name)} {text}")
    return ", ".join(parts)


def _passes(cell: Cell, ks: list[str]) -> list[list[float]]:
    """[k, mean, low, high] for each k."""
    values = {int(k): pass_at_k(cell.correct, int(k)) for k in ks}
    return [[k, float(v.mean()), *bootstrap_interval(v)] for k, v in values.items()]


def _mark_front(rows: list[dict]) -> None:
    """``front``: no other cell is at least as good in accuracy and in NFE, and better in one of them."""
    points = [(row["summary"]["nfe"], -row["summary"]["accuracy"]) for row in rows]
    for row, (nfe, loss) in zip(rows, points, strict=True):
        row["front"] = not any(a <= nfe and b <= loss and (a, b) != (nfe, loss) for a, b in points)


def _completions(cells: list[Cell], prompts: dict, most: int) -> tuple[list[list], int]:
    """[cell, prompt, completion, correct, nfe, reward], problem by problem, and how many there are in all."""
    rows = []
    total = sum(len(problem["completion"]) for cell in cells for problem in cell.problems)
    for position in range(max((len(cell.problems) for cell in cells), default=0)):
        for index, cell in enumerate(cells):
            problem = cell.problems[position] if position < len(cell.problems) else None
            if problem is None or len(rows) + len(problem["completion"]) > most:
                continue
            prompt = _prompt(problem, prompts)
            samples = zip(*(problem[name] for name in ("completion", "correct", "nfe", "reward")), strict=True)
            rows += [[index, prompt, text, bool(right), nfe, _round(reward)] for text, right, nfe, reward in samples]
    return sorted(rows, key=lambda row: row[1]), total


def _prompt(record: dict, prompts: dict) -> int:
    """Place of a record's (problem id, prompt) among all, which it joins."""
    return prompts.setdefault((record["problem_id"], record["prompt"]), len(prompts))


def _film(film: dict, cell: int, prompts: dict) -> dict:
    kept = {name: film[name] for name in ("tokens", "step_of", "nfe")}
    confidence = [_round(c) for c in film["confidence"]]
    return kept | {
        "cell": cell,
        "prompt": _prompt(film, prompts),
        "confidence": confidence,
        "correct": bool(film["correct"]),
    }


def _round(value: float) -> float:
    return round(float(value), 4)


def _title(flat: list[dict], folders: list[Path]) -> str:
    def count(n: int, thing: str) -> str:
        return f"{n} {thing}{'s' * (n != 1)}"

    if not flat:
        return count(len(folders), "training run")
    samplers, tasks = {s["sampler"] for s in flat}, list(dict.fromkeys(_text(s["env.id"]) for s in flat))
    return f"{count(len(samplers), 'sampler')} on {', '.join(tasks[:4])}{' and others' * (len(tasks) > 4)}"


def _subtitle(flat: list[dict], paths: list[Path]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(_text(settings[name]) for settings in flat if name in settings))

    newest = max(_written(path) for path in paths)
    parts = [f"results of {time.strftime('%Y-%m-%d', time.localtime(newest))}"]
    if flat:
        each = f", {all_of('samples')} samples each" if all_of("samples") != "1" else ""
        problems = f"{all_of('problems')} problems of the {all_of('split')} split{each}"
        parts = [f"denoiser {all_of('env.denoiser')}", problems, f"dllm-gym {all_of('version')}", *parts]
    return " · ".join(parts)


def _written(path: Path) -> float:
    """When the results were written; a folder's own time changes with whatever is put into it."""
    return (path / "metrics.jsonl" if path.is_dir() else path).stat().st_mtime


def _group_titles(keys: list[tuple]) -> list[str]:
    """The task, and what sets a group apart from the others."""
    groups = [dict(zip(COMPARABLE, key, strict=True)) for key in keys]
    apart = [name for name in _apart(groups, list(COMPARABLE)) if name != "env.id"]
    return [_with(_text(group["env.id"]), group, apart) for group in groups]


def _curves(folders: list[Path]) -> list[dict]:
    """Reward, accuracy and NFE of training runs (the loss where a run has none of them), each run with its mean.

    Over steps; over forward passes where all runs were trained for a number of these.
    """
    logs = [(folder, _log(folder)) for folder in folders]
    along = "forwards" if all(read_config(folder).get("forwards") for folder in folders) else "step"
    curves = []
    for metric in ("reward", "accuracy", "nfe", "loss"):
        runs = []
        for index, (folder, rows) in enumerate(logs):
            kept = [row for row in rows if isinstance(row.get(metric), int | float) and math.isfinite(row[metric])]
            if not kept or (metric == "loss" and any("reward" in row for row in rows)):
                continue
            bins = np.array_split(np.array([[row[along], row[metric]] for row in kept]), min(len(kept), CURVE_POINTS))
            step, value = np.array([part.mean(axis=0) for part in bins]).T
            smooth = [_round(v) for v in _running_mean(value)]
            raw = [_round(v) for v in value]
            runs.append({"name": folder.name, "index": index, "step": step.tolist(), "raw": raw, "smooth": smooth})
        if runs:
            curves.append({"metric": metric.upper() if metric == "nfe" else metric, "along": along, "runs": runs})
    return curves


def _log(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line that is being written is left out."""
    read_config(folder)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    if not rows:
        raise ValueError(f"results={str(folder)!r}: no row in its metrics.jsonl yet; leave it out, or wait.")
    return rows


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred, over a fifteenth of the curve on either side, less at the ends."""
    reach = max(1, len(values) // 15)
    sums = np.concatenate([[0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _finite(value):
    """JSON knows no NaN: null in its place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
