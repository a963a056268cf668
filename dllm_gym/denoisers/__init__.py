"""Denoisers: the frozen model that the environment decodes with."""
