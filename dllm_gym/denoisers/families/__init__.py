"""Families of denoisers. A new one is a file beside these, and a line here."""

from dllm_gym.denoisers.families.a2d import A2D
from dllm_gym.denoisers.families.base import Family
from dllm_gym.denoisers.families.dream import DREAM
from dllm_gym.denoisers.families.llada import LLADA
from dllm_gym.denoisers.families.own import OWN
from dllm_gym.denoisers.families.sdar import SDAR

FAMILIES = (LLADA, DREAM, SDAR, A2D, OWN)


def find_family(given: str, model_type: str | None) -> Family:
    """The family of a ``model_type``. Raises ValueError, which begins with how the user named the checkpoint."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(repr(name) for family in FAMILIES for name in family.model_types)
    raise ValueError(f"{given}: model_type={model_type!r} cannot be read; known are {known}.")
