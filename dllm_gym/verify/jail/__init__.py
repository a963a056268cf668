"""What runs inside the sandbox. Its files are started by `dllm_gym.verify.sandbox`, not imported from here."""
