"""``python -m dllm_gym.eval``: the same as ``dllm-eval``."""

import sys

from dllm_gym.eval.cli import main

sys.exit(main())
