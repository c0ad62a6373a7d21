"""Ways of other projects, and ours, to keep a teacher's distribution, for `bench_rivals.py`."""
