"""What a user's spelling means: names in any case, and errors that say which one is near."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def find(name: Any, known: Iterable[str], argument: str, others: str = "") -> str:
    """The one of ``known`` that is spelt as ``name``, or else the one that is in another case.

    Args:
        name: as a user gave it.
        known: what there is.
        argument: what it was given as, for the error.
        others: what else may be given, for the error.

    Raises:
        ValueError: there is none. The message has all that are known, and the nearest.
    """
    known = sorted(known)
    if name in known:
        return name
    folded = str(name).lower()
    for spelling in known:
        if spelling.lower() == folded:
            return spelling
    raise ValueError(f"{argument}={name!r}: must be one of {known}{others}.{hint(folded, known)}")


def hint(name: str, known: Iterable[str]) -> str:
    """The end of an error: the one of ``known`` that is spelt most like ``name``; empty where none is near."""
    spellings = {spelling.lower(): spelling for spelling in known}
    near = difflib.get_close_matches(name.lower(), spellings, n=1)
    return f" Did you mean {spellings[near[0]]!r}?" if near else ""


def refuse_unknown(given: dict[str, Any], *takers: Callable) -> None:
    """Refuse keyword arguments that no taker has a parameter for.

    Args:
        given: keyword arguments.
        takers: who takes some of them each.

    Raises:
        TypeError: in Python's words, which TorchRL reads, with the nearest parameter, or all where none is near.
    """
    parameters = [parameter for taker in takers for parameter in inspect.signature(taker).parameters.values()]
    known = list(dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)))
    for name, value in given.items():
        if name not in known:
            which = hint(name, known) or f" It must be one of {', '.join(known)}."
            raise TypeError(f"got an unexpected keyword argument {name!r}, with the value {value!r}.{which}")
