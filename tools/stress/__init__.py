"""Fault tests of the sparse-logit cache, which `tools/stress_cache.py` runs, and the job that `stress_train.py` strikes at."""
