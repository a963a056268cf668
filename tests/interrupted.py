"""A training run that ends before its time."""

import os
import signal
from contextlib import contextmanager
from unittest.mock import patch

from dllm_gym.agents.trainers.run import Run


class Killed(BaseException):
    """What no trainer catches, as SIGKILL is."""


@contextmanager
def interrupted(kill_at: int = 0, signal_at: int = 0):
    """The run inside dies after line ``kill_at`` of its log, gets Ctrl-C after line ``signal_at``; 0: it does not."""
    log, lines = Run.log, []

    def log_and_die(run, step, metrics, *rest):
        log(run, step, metrics, *rest)
        lines.append(step)
        if len(lines) == kill_at:
            raise Killed
        if len(lines) == signal_at:
            os.kill(os.getpid(), signal.SIGINT)

    with patch.object(Run, "log", log_and_die):
        try:
            yield
        except Killed:
            assert kill_at
        except SystemExit as stop:
            assert signal_at and stop.code == 130
