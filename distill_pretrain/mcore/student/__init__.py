"""A model that learns: optimizer steps, and its state on disk."""
