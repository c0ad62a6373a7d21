"""How a recipe's plain words are read: as the key's type asks, and without the surprises of YAML 1.1.

PyYAML reads `010` as 8, `1:30` as 90, `off` as false and `2026-01-02` as a date. Here numbers are decimal (or
hexadecimal after `0x`), only `true` and `false` are switches, and a key that takes text gets the very words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from distill_pretrain.config.base import Section

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)


class WrittenInt(int):
    """A whole number that remembers how it was written."""

    text: str


class WrittenFloat(float):
    """A number that remembers how it was written."""

    text: str


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the module's rules for plain words."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> WrittenInt:
    digits = node.value.replace("_", "")
    number = WrittenInt(digits, 16 if "0x" in digits else 10)
    number.text = node.value
    return number


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> WrittenFloat:
    number = WrittenFloat(loader.construct_yaml_float(node))
    number.text = node.value
    return number


_REPLACED = {f"{_TAG}{name}" for name in ("bool", "int", "float", "timestamp")}
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    f"{_TAG}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
RecipeLoader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
RecipeLoader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
RecipeLoader.add_constructor(f"{_TAG}int", _construct_int)
RecipeLoader.add_constructor(f"{_TAG}float", _construct_float)


def read_yaml(text: str) -> Any:
    """Read the value of a YAML text; numbers become `WrittenInt` and `WrittenFloat`.

    Raises:
        yaml.YAMLError, ValueError: it is no YAML.
    """
    return yaml.load(text, Loader=RecipeLoader)


def as_annotated(value: Any, annotation: Any) -> Any:
    """Return a value as read, with the words themselves wherever the type takes text and no number.

    Args:
        value: from `read_yaml`.
        annotation: the type of its field; None or Any where nothing is known of it.

    Returns:
        The same with plain ints and floats.
    """
    parts = list(_parts(annotation))
    if isinstance(value, dict):
        return {
            as_annotated(name, None): as_annotated(inner, _inner(parts, name))
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [as_annotated(inner, _item(parts)) for inner in value]
    if isinstance(value, bool):
        return str(value).lower() if _takes_text_only(parts) else value
    if isinstance(value, WrittenInt | WrittenFloat):
        if _takes_text_only(parts):
            return value.text
        return int(value) if isinstance(value, int) else float(value)
    return value


def _parts(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type but null."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    elif annotation not in (None, type(None)):
        yield annotation


def _takes_text_only(parts: list[Any]) -> bool:
    return bool(parts) and all(
        all(isinstance(choice, str) for choice in get_args(part))
        if get_origin(part) is Literal
        else part in (str, Path)
        for part in parts
    )


def _item(parts: list[Any]) -> Any:
    """The type of a list's items."""
    for part in parts:
        if get_origin(part) in (tuple, list):
            return get_args(part)[0]
    return None


def _inner(parts: list[Any], name: object) -> Any:
    """The type of what a mapping has under a name."""
    for part in parts:
        if get_origin(part) is dict:
            return get_args(part)[1]
        if isinstance(part, type) and issubclass(part, Section) and name in part.model_fields:
            return part.model_fields[str(name)].annotation
    return None
