"""``python -m dllm_gym.eval.report``: the same as ``dllm-eval report``."""

import sys

from dllm_gym.eval.report.page import main

sys.exit(main())
