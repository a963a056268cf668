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
    in_lower_case = {spelling.lower(): spelling for spelling in known}
    folded = str(name).lower()
    if folded in in_lower_case:
        return in_lower_case[folded]
    near = difflib.get_close_matches(folded, in_lower_case, n=1)
    hint = f" Did you mean {in_lower_case[near[0]]!r}?" if near else ""
    raise ValueError(f"{argument}={name!r}: must be one of {known}{others}.{hint}")


def refuse_unknown(given: dict[str, Any], *takers: Callable) -> None:
    """Refuse keyword arguments that none of ``takers`` has among its keyword-only ones.

    Raises:
        TypeError: in Python's words, which TorchRL reads; the message has the nearest argument, or all if none is near.
    """
    parameters = [parameter for taker in takers for parameter in inspect.signature(taker).parameters.values()]
    known = list(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(known)}."
            raise TypeError(f"got an unexpected keyword argument {name!r}, with the value {value!r}; {hint}")
