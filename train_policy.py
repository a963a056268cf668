"""Train a policy or a denoiser: ``python train_policy.py ALGORITHM --help``."""

from __future__ import annotations

import sys

from dllm_gym.agents.cli import main

if __name__ == "__main__":
    sys.exit(main())
