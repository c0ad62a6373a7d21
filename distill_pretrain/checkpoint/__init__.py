"""Checkpoints of a run: published whole, hashed, pruned."""
