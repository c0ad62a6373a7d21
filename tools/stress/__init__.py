"""Fault tests: of the sparse-logit cache (`stress_cache.py`), and the job that `stress_train.py` strikes at."""
