"""Smaller models out of trained ones: which layers, heads and channels to keep, and the folder that has only those."""
