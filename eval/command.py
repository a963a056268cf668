"""What the commands of this folder share: mistakes as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import tyro


def run(prog: str, config_type: type, function: Callable, argv: list[str] | None) -> int:
    """Call a function with the config that the flags give; a mistake is one line and exit code 2 (Ctrl-C: 130)."""
    try:
        function(tyro.cli(config_type, prog=prog, args=argv))
    except (ValueError, IndexError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DLLM_GYM_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}\n(DLLM_GYM_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
