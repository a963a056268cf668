"""Trainers: one algorithm, one file; beside them what they share."""
