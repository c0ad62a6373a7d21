"""A recipe with some keys replaced, as comparisons and phases need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from distill_pretrain.config import load_recipe
from distill_pretrain.config.layers import COMMAND_LINE
from distill_pretrain.errors import ConfigError
from distill_pretrain.jobs.recipe import Recipe


def with_settings(
    recipe: Recipe,
    where: str,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    what: str = "a job of the comparison",
) -> Recipe:
    """Return the recipe with some keys replaced, checked as if they had come with it.

    Args:
        recipe: to start from; it stays.
        where: key of the recipe that the settings come from, for messages.
        settings: section -> key -> value.
        what: is refused where they are.

    Raises:
        ConfigError: a key is unknown, or a value is refused.
    """
    values = {k: v for k, v in recipe.model_dump(mode="json").items() if v is not None}
    whole = [_override(name, section) for name, section in values.items()]
    changed = [
        _override(f"{section}.{key}", value)
        for section, keys in settings.items()
        for key, value in keys.items()
    ]
    try:
        return load_recipe(Recipe, None, [*whole, *changed])
    except ConfigError as error:
        found = str(error).replace(f"{COMMAND_LINE}: ", "")
        raise ConfigError(f"{what} is refused", where=where, found=found) from None


def _override(key: str, value: object) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=1_000_000, allow_unicode=True
    )
    return f"{key}={text.removesuffix('...' + chr(10))}"
