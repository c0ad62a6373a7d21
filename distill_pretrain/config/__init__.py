"""Typed recipes: YAML with `base:` inheritance and `section.key=value` overrides."""

from distill_pretrain.config.base import Section, nameable
from distill_pretrain.config.describe import describe
from distill_pretrain.config.loader import dump_recipe, load_recipe, recipe_text, require

__all__ = [
    "Section",
    "describe",
    "dump_recipe",
    "load_recipe",
    "nameable",
    "recipe_text",
    "require",
]
