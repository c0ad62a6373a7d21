"""Held-out figures and reports."""
