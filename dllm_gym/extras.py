"""What comes with an extra of the installation, for example ``pip install 'dllm-gym[train]'``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports inside come with an extra. Raises ImportError that says how to install it, where one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ImportError(f"{package} is not installed: pip install 'dllm-gym[{extra}]'.") from error
