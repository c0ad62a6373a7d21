"""Recipes compared over seeds: figures, orderings and their report."""
