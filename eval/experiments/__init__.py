"""Experiments as files, and what reads and runs them."""
