"""A comparison: its plan, and its run."""
