"""Rows of data: from local files and from the hub. Every failure is one line that says what was given."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from dllm_gym.extras import needs

SUFFIXES = (".jsonl", ".csv", ".parquet")
HUB_TIMEOUT = 10.0
"""Seconds that a hub may take to answer before it counts as out of reach."""


def read_file(path: Path) -> list[dict]:
    """The rows of a .jsonl, .csv or .parquet file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken, named with the line, or has no rows.
    """
    given = f"dataset={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{given}: no such file.")
    if path.suffix == ".parquet":
        with needs("data"):
            import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except Exception as error:
            raise ValueError(f"{given}: not a parquet file ({first_line(error)}).") from error
    else:
        read = _read_csv if path.suffix == ".csv" else _read_jsonl
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                rows = read(file, given)
            except UnicodeDecodeError as error:
                raise ValueError(f"{given}: not UTF-8 ({error}).") from error
    if not rows:
        raise ValueError(f"{given}: no rows.")
    return rows


def load_hub(hub_id: str, config: str | None, split: str) -> Sequence[dict]:
    """One split of a hub set, from the cache where the hub is out of reach.

    `datasets` alone retries for half a minute where there is no network, and for minutes where packets are dropped;
    so the hub is asked once beforehand, and offline mode switched on where it does not answer.

    Raises:
        Exception: whatever `datasets` raises where it cannot load the set, or the network where that is the cause.
    """
    with needs("data"):
        import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    offline, unreachable = datasets.config.HF_HUB_OFFLINE, None
    try:
        if not offline:
            HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)
    except HfHubHTTPError:
        pass  # it answered: `datasets` says better what is wrong with this set
    except Exception as error:
        datasets.config.HF_HUB_OFFLINE, unreachable = True, error
    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:
        raise unreachable or error from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0]


def _read_csv(file, given: str) -> list[dict]:
    reader = csv.DictReader(file)
    try:
        return list(reader)
    except csv.Error as error:
        raise ValueError(f"{given}, line {reader.reader.line_num}: not CSV ({error}).") from error


def _read_jsonl(file, given: str) -> list[dict]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{given}, line {number}: not JSON ({error}).") from error
    return rows
