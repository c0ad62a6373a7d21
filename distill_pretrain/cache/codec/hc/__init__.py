"""Codecs 3 and 4, entropy coded; FORMAT.md beside the cache specifies every bit."""
