"""Names on the Hugging Face hub, and downloads from it."""

from __future__ import annotations

import re
from pathlib import Path


def is_hub_id(name: str) -> bool:
    """Whether a name has the form "owner/name"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download(given: str, name: str, patterns: list[str]) -> Path:
    """The files of a hub repository that match the patterns, which are downloaded once.

    Args:
        given: how the user named it, to begin the error with.
        name: "owner/name".
        patterns: as of file names.

    Raises:
        FileNotFoundError: it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise FileNotFoundError(
            f"{given}: no such folder, and it cannot be downloaded from the hub ({type(error).__name__}: {reason}). "
            f"Download it where there is a network (`hf download {name}`) and give the folder."
        ) from error
