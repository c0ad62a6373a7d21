"""Megatron-core itself: its names, its process groups, and what it needs on CPUs."""
