"""Teacher distribution -> sparse targets: exact integer inverse-CDF samplers (numpy, and what a GPU has to give)."""
