"""A module for every family, with `FAMILIES`; `registry` finds them, and nothing else names them."""
