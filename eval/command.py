"""What the commands of this folder share: mistakes as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from dllm_gym.extras import needs

with needs("train"):
    import tyro


class Failed(Exception):
    """Some of several pieces of work failed, each said on a line of the message; the others are done and kept."""

    def __init__(self, failures: list[str], of: int):
        super().__init__("\n".join([*failures, f"{len(failures)} of {of} failed; what succeeded is kept."]))


def one_line(error: BaseException) -> str:
    """What an error says, its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def run(
    prog: str, config_type: type, function: Callable, argv: list[str] | None, default: Callable[[], Any] | None = None
) -> int:
    """Call a function with the config that the flags give, or else what ``default`` makes. Returns the exit code.

    A mistake is one line and 2, `Failed` a line for each piece and 1, Ctrl-C 130.
    """
    try:
        defaults = {"default": default()} if default else {}
        function(tyro.cli(config_type, prog=prog, args=argv, **defaults))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, IndexError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DLLM_GYM_TRACEBACK"):
            raise
        print(f"error: {one_line(error)}\n(DLLM_GYM_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
