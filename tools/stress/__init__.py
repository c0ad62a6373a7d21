"""Fault tests of the sparse-logit cache; `tools/stress_cache.py` runs them."""
