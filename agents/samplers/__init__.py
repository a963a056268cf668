"""Samplers: what chooses the positions to unmask, learned or not, and how episodes are played with them."""
