"""Deterministic order, token and cache join, micro-batches."""
