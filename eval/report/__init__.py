"""The page that ``dllm-eval report`` makes of results files."""
